"""A decode step as one launch: CUDA graphs around a Transformer.

    model = Graphed(Transformer.from_pretrained(folder, "cuda"))
    sample.generate(model, tokens, 100)

A decode step issues hundreds of small kernels, and on a GPU the host takes longer to issue them
than the device to run them. A graph records them once and replays them in one launch. It replays
the same kernels on the same addresses, which leads to three rules.

* The tokens, the cache and all that the model reads must stay where they are. If a parameter or a
  buffer that a graph reads is no longer the model's, or if a module is another one, the graphs are
  recorded anew.
* Nothing may depend on a number that the host knows, such as the cache's max_length. So a recorded
  step reads a fixed number of positions in every row, and a mask hides those that are not filled.
  There is one graph for each such number.
* The host must wait for nothing within a step.
"""

import copy
import math
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import caprese
from model import Cache


class GraphCache(Cache):
    """A Cache with the graphs that were recorded on it.

    fixed_num_keys, if set, is how many positions a step reads whatever the rows hold.
    """

    def __init__(self, config, batch_size, capacity, device, dtype):
        super().__init__(config, batch_size, capacity, device, dtype)
        self.fixed_num_keys = None
        self.tokens = torch.zeros_like(self.lengths)  # [B], what a graph embeds
        self.graphs = {}  # {(version, phase, number of keys): (graph, its logits)}
        self.lender = None  # the Graphed that has this memory for later use as well

    def num_keys(self, T):
        return self.fixed_num_keys or super().num_keys(T)

    def reorder(self, rows):
        if self.lender is not None:
            self.lender.last = None  # so that the memory of the old rows is free at once
        super().reorder(rows)
        self.tokens = torch.zeros_like(self.lengths)
        self.graphs = {}  # those that were recorded read other tensors


class Reads(TorchDispatchMode):
    """Collects the addresses of the memory that operations within this context read."""

    def __init__(self):
        super().__init__()
        self.addresses = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self.addresses.add(address(value))
        return operation(*args, **kwargs)


def address(tensor):
    """Where the memory begins that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


class Watch:
    """A hook that notes whether the decoder has run: afterwards the model may read other tensors.

    Neurons are selected after a pass of the full model, at a prefill as at a reselection.
    """
    has_run = True

    def __call__(self, decoder, inputs):
        self.has_run = True


class Graphed:
    """A Transformer on a CUDA device whose decode steps are graphs; in all else the Transformer.

    Raises ValueError for a model that is elsewhere.
    """

    def __init__(self, transformer):
        if transformer.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a model on a CUDA device, and this one is on "
                             f"{transformer.device}: leave them out or move the model")
        self.transformer = transformer
        self.watch = Watch()
        transformer.model.register_forward_pre_hook(self.watch)
        self.version = 0  # counts how often the model has changed
        self.layout = []  # the model's modules in this version
        self.read = []    # its tensors that graphs read; held, so that no other gets their address
        self.last = None  # the newest cache: memory and graphs for the next one
        self.user = None  # a weak reference to the copy of it that was handed out

    def __getattr__(self, name):
        if name == "transformer":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.transformer, name)

    def __call__(self, tokens):
        return self.transformer(tokens)

    def new_cache(self, batch_size, capacity):
        """An empty cache for so many sequences of at least `capacity` tokens.

        It has the memory and the graphs of the last one, if that is large enough and not in use.
        """
        last = self.last
        in_use = self.user is not None and self.user() is not None
        if last is None or in_use or len(last.tokens) != batch_size or last.capacity < capacity:
            self.last = None  # its memory is free before the next one needs it
            rounded = min(1024 * math.ceil(capacity / 1024), self.config.max_position_embeddings)
            self.last = GraphCache(self.config, batch_size, max(capacity, rounded), self.device,
                                   self.dtype)
        cache = copy.copy(self.last)  # the same tensors and graphs
        cache.k, cache.v = list(cache.k), list(cache.v)
        cache.set_lengths(torch.zeros_like(cache.lengths))
        cache.lender = self
        self.user = weakref.ref(cache)
        return cache

    @torch.no_grad()
    def decode(self, tokens, cache):
        """One decode step: tokens [B] int64 -> logits [B, V]; the cache advances by one token.

        The next step overwrites the logits.
        """
        phases = {ff.call.phase for ff in caprese.sparse_layers(self.transformer).values()}
        if not phases <= {"full", "decode"}:  # what is counted is no part of a graph
            return self.transformer.decode(tokens, cache)
        if self.watch.has_run:
            self.check()
        num_keys = keys_to_read(cache.num_keys(1), cache.capacity)
        key = (self.version, tuple(phases), num_keys)
        cache.tokens.copy_(tokens)
        if key not in cache.graphs:
            for other in [other for other in cache.graphs if other[0] != self.version]:
                del cache.graphs[other]
            cache.graphs[key] = self.capture(cache, num_keys)
        graph, logits = cache.graphs[key]
        graph.replay()
        cache.max_length += 1  # the graph has advanced cache.lengths
        return logits

    def tensors(self):
        """All parameters and buffers of the model."""
        return [*self.parameters(), *self.buffers()]

    def check(self):
        """Start a new version if a tensor that graphs read has gone, or a module is another one."""
        self.watch.has_run = False
        layout = list(self.modules())
        present = {(address(tensor), tensor.shape) for tensor in self.tensors()}
        lost = [tensor for tensor in self.read if (address(tensor), tensor.shape) not in present]
        if lost or layout != self.layout:
            self.version += 1
            self.layout = layout
            self.read = []

    def fixed_step(self, cache, num_keys):
        """A decode step on cache.tokens that reads num_keys positions: logits [B, V]."""
        ragged = cache.ragged
        cache.fixed_num_keys = num_keys
        cache.ragged = True  # so that positions come from the device, and a mask is used
        try:
            return self.transformer.decode(cache.tokens, cache)
        finally:
            cache.fixed_num_keys = None
            cache.ragged = ragged

    def first_step(self, cache, num_keys):
        """fixed_step, taken back, which notes the tensors of the model that it reads."""
        with Reads() as reads:
            self.fixed_step(cache, num_keys)
        cache.advance(-1)
        known = {address(tensor) for tensor in self.read}
        for tensor in self.tensors():
            if address(tensor) in reads.addresses - known:
                self.read.append(tensor.detach())

    def capture(self, cache, num_keys):
        """(CUDA graph of fixed_step, the logits that it writes). The cache stays as it is."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # once for real: what libraries set up is not recorded
                self.first_step(cache, num_keys)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                logits = self.fixed_step(cache, num_keys)
        cache.max_length -= 1  # nothing has run yet
        return graph, logits


def keys_to_read(length, capacity):
    """How many positions a recorded step reads if the longest row then holds `length` tokens.

    It is the next multiple of 256, and later of an eighth or a sixteenth of the length: so there
    are few graphs, and few positions are read in vain.
    """
    unit = 256
    while 16 * unit <= length:
        unit *= 2
    return min(math.ceil(length / unit) * unit, capacity)
