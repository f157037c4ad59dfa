"""Ours: accuracy and length from kept answers, without any model: python -m paper.recount

paper/answers/ holds what every variant of the fine-tuned SmolLM2 wrote (RESULTS.md says how). Each
answer is graded anew by paper.grading, but for summaries, whose ROUGE-1 was kept with them.
`python -m paper.recount runs` first collects the answers that scripts of this folder left there.
"""

import gzip
import json
import statistics
import sys
import zlib
from pathlib import Path

import data
import sample
from paper import scores
from paper.experiment import read_answers
from paper.report import write

FOLDER = Path(__file__).resolve().parent / "answers"
NEEDED = {"variant", "question", "answer", "response", "tokens"}  # of those of earlier versions too
KEPT = ("set", "variant", "kind", "question", "answer", "response", "tokens", "ended")


def collect(runs):
    """Write the first answer to each problem in the folder `runs` to a file for each set.

    Raises ValueError where two files answer the same problem under the same variant's name.
    """
    sets, seen = {}, set()
    for file in sorted(Path(runs).glob("*.jsonl")):
        for answer in read_answers(file).values():
            if answer["run"] > 0:
                continue
            problem = answer["set"], answer["variant"], answer["problem"]
            if problem in seen:
                raise ValueError(f"{file} is a second file of {problem}, learned or decoded in "
                                 f"another way: keep one of them in {runs}")
            seen.add(problem)
            kept = {key: answer[key] for key in KEPT}
            kept["variant"] = kept["variant"].replace("GRIFFIN", "griffin").replace("CATS", "cats")
            if "rouge1" in answer:  # news articles are not ours to give away
                kept |= {"question": f"row {answer['problem'] + 1} of the data set", "answer": "",
                         "rouge1": round(answer["rouge1"], 4)}
            sets.setdefault(answer["set"], []).append(kept)
    if not sets:
        raise ValueError(f"{runs} holds no answers of the scripts in paper/")
    FOLDER.mkdir(exist_ok=True)
    for name, answers in sets.items():
        answers.sort(key=lambda answer: answer["question"])  # so that they compress well
        text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        write(FOLDER / f"{name}.jsonl.gz", gzip.compress(text.encode(), mtime=0))


def score(answer):
    """What a kept answer earns, in [0, 1]: right or wrong, in a passage whether the response
    contains the answer, of an article the ROUGE-1 that was kept."""
    if "rouge1" in answer:
        return answer["rouge1"]
    kind = answer.get("kind", "maths")  # which answers of earlier versions do not have
    problem = data.Problem(answer["question"], "", answer["answer"], kind)
    found = scores.scores(problem, answer["response"])
    return found["contains" if kind == "passage" else "accuracy"]


def read_kept(file):
    """The answers in a file of FOLDER; ValueError, which names it, if it is damaged."""
    try:
        text = gzip.decompress(file.read_bytes()).decode()
        answers = [json.loads(line) for line in text.split("\n")[:-1]]
        if all(answer.keys() >= NEEDED for answer in answers):
            return answers
        reason = f"a line has not all of {', '.join(sorted(NEEDED))}"
    except (OSError, EOFError, zlib.error, ValueError, AttributeError) as error:
        reason = error
    raise ValueError(f"{file} is damaged ({reason}); fetch it again, or collect it anew from the "
                     "folder of its run")


def count(file):
    """A row for each variant in a file of answers: its score in percent with standard error.

    ended is how many of them stopped before their limit; answers of earlier versions do not know.
    """
    answers = {}
    for answer in read_kept(file):
        answers.setdefault(answer["variant"], []).append(answer)
    rows = []
    for variant, of_variant in sorted(answers.items()):
        values = [score(answer) for answer in of_variant]
        ended = [answer["ended"] for answer in of_variant if "ended" in answer]
        rows.append({"variant": variant, "set": file.name.split(".")[0], "answers": len(values),
                     "score %": 100 * statistics.fmean(values),
                     "score ±": 100 * scores.standard_error(values),
                     "tokens": statistics.fmean(answer["tokens"] for answer in of_variant),
                     "ended %": 100 * statistics.fmean(ended) if ended else None})
    return rows


def main():
    for runs in sys.argv[1:]:
        collect(runs)
    files = sorted(FOLDER.glob("*.jsonl.gz"))
    if not files:
        raise ValueError(f"{FOLDER} holds no answers")
    for file in files:
        print(sample.format_table(count(file)), end="\n\n")


if __name__ == "__main__":
    sample.run_command(main)
