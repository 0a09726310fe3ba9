"""python tools/bench/turns.py MODEL: right answers by turn, in conversations of held-out questions.

The model is a quickstart's. Each turn asks something new, and what the model
itself said before stays in the conversation, as in `sample --chat`.
"""

import argparse
import random

import jaxllm
from jaxllm.evaluation.tasks import APPLICATIONS, held_out, is_correct
from jaxllm.inference.sampling import Sampler


def main() -> None:
    """Print the fraction of right answers of each turn, greedy."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model")
    arguments.add_argument("--count", type=int, default=100, help="conversations")
    arguments.add_argument("--turns", type=int, default=4)
    given = arguments.parse_args()
    lm = jaxllm.load(given.model)
    n = given.count * given.turns
    examples = [each for name in APPLICATIONS for each in held_out(name, "new_combinations", -(-n // 5), seed=11)]
    random.Random("turns").shuffle(examples)
    conversations = [[] for _ in range(given.count)]
    for turn in range(given.turns):
        asked = examples[turn * given.count : (turn + 1) * given.count]
        for messages, example in zip(conversations, asked, strict=True):
            messages.append({"role": "user", "content": example.prompt})
        answers = [
            each.text for each in lm.generate(conversations, max_new_tokens=64, sampler=Sampler(temperature=0.0))
        ]
        for messages, text in zip(conversations, answers, strict=True):
            messages.append({"role": "assistant", "content": text})
        right = [is_correct(example, text) for example, text in zip(asked, answers, strict=True)]
        wrong = {
            name: sum(not ok for e, ok in zip(asked, right, strict=True) if e.application == name)
            for name in APPLICATIONS
        }
        print(f"turn {turn + 1}: {sum(right) / len(right):.3f} right of {len(right)}; wrong: {wrong}", flush=True)


if __name__ == "__main__":
    main()
