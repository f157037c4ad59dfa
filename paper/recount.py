"""Ours: accuracy and length from kept answers, without any model: python -m paper.recount

paper/answers/ holds what every variant of the fine-tuned SmolLM2 wrote (RESULTS.md says how). Each
answer is graded anew by data.correct, but for summaries, whose ROUGE-1 was kept with them.
`python -m paper.recount runs` first collects the answers that scripts of this folder left there.
"""

import gzip
import json
import statistics
import sys
from pathlib import Path

from paper.experiment import read_answers

import data
import sample

FOLDER = Path(__file__).resolve().parent / "answers"
KEPT = ("set", "variant", "question", "answer", "response", "tokens")


def collect(runs):
    """Write the first answer to each problem in the folder `runs` to a file for each set.

    Raises ValueError where two files answer the same problem under the same variant's name.
    """
    sets, seen = {}, set()
    for file in sorted(Path(runs).glob("*.jsonl")):
        for answer in read_answers(file):
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
        (FOLDER / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def count(file):
    """A row for each variant in a file of answers: its score in percent with standard error."""
    scores, tokens = {}, {}
    for line in gzip.decompress(file.read_bytes()).decode().split("\n")[:-1]:
        answer = json.loads(line)
        score = answer.get("rouge1")
        if score is None:
            score = data.correct(answer["response"], answer["answer"])
        scores.setdefault(answer["variant"], []).append(100 * score)
        tokens.setdefault(answer["variant"], []).append(answer["tokens"])
    rows = []
    for variant, values in sorted(scores.items()):
        rows.append({"variant": variant, "set": file.name.split(".")[0], "answers": len(values),
                     "score %": statistics.fmean(values),
                     "±": statistics.pstdev(values) / len(values) ** 0.5,
                     "tokens": statistics.fmean(tokens[variant])})
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
