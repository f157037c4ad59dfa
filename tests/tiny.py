"""Small random models for the tests: no file, no download."""

import torch

from caprese import sparse_layers
from model import Config, Transformer

CONFIG = {"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 80,
          "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
VARIANTS = {  # what each family does that the others do not
    "llama": {"rope_scaling": LLAMA3},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
              "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gemma2": {"model_type": "gemma2", "sliding_window": 5, "head_dim": 16,
               "num_key_value_heads": 2, "query_pre_attn_scalar": 12,
               "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
}


def model(seed=0, device="cpu", **changes):
    """A frozen random Transformer whose weights are large enough that FF errors show."""
    torch.manual_seed(seed)
    model = Transformer(Config.from_dict(CONFIG | changes))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.15)
    return model.requires_grad_(False).eval().to(device)


def fill(model, seed=1):
    """Give the attached correction random values of a size that matters."""
    generator = torch.Generator().manual_seed(seed)
    for ff in sparse_layers(model).values():
        for p in ff.adapter_parameters().values():
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def tokens(batch_size, length, seed=2, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG["vocab_size"], (batch_size, length),
                         generator=generator).to(device)
