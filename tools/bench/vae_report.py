"""What a trained VAE does with sentences that it was not trained on, with new latents, and between two sentences.

    python tools/bench/vae_report.py runs/vae --data data/captions --image docs/images/vae.png

Words in place: share of the words of a sentence that its reconstruction has at the same place. Words at all: share that
it has anywhere. The control is the reconstruction of the sentence before, which says how alike sentences are anyway.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

import jaxllm
from jaxllm.data.shards import Dataset
from jaxllm.training.metrics import read

PAIRS = (
    ("A man is riding a bike down the street.", "Two dogs are playing in the snow."),
    ("A woman in a red dress is singing.", "A group of people are standing in front of a building."),
)


def in_place(text: str, other: str) -> float:
    """Return the share of the words of `text` that `other` has at the same place."""
    words, others = text.split(), other.split()
    return sum(a == b for a, b in zip(words, others, strict=False)) / len(words)


def at_all(text: str, other: str) -> float:
    """Return the share of the words of `text` that `other` has, each as often as it has it."""
    words = Counter(text.split())
    return (words & Counter(other.split())).total() / words.total()


def reconstruction(vae: jaxllm.VAE, texts: list[str]) -> list[str]:
    """Print how well texts are reconstructed from their mean latents, and return the reconstructions."""
    found = vae.reconstruct(texts)
    control = found[-1:] + found[:-1]
    for name, others in (("reconstruction", found), ("control", control)):
        exact = np.mean([text == other for text, other in zip(texts, others, strict=True)])
        place, shared = (
            np.mean([share(text, other) for text, other in zip(texts, others, strict=True)])
            for share in (in_place, at_all)
        )
        print(f"{name} of {len(texts)}: exact {exact:.1%}, words in place {place:.1%}, words at all {shared:.1%}")
    return found


def draw(run: Path, image: Path) -> None:
    """Draw the bound and its two parts over the steps."""
    from matplotlib.figure import Figure

    lines = read(run / "metrics.jsonl")
    trained, held_out = ([each for each in lines if key in each] for key in ("kl_weight", "val_loss"))
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    curve = lambda axes, records, key, label, **look: axes.plot(
        [each["step"] for each in records], [each[key] for each in records], label=label, **look
    )
    window = np.ones(25) / 25
    smooth = np.convolve([each["loss"] for each in trained], window, mode="valid")
    left.plot([each["step"] for each in trained][12:-12], smooth, label="−ELBO, trained on", color="#9aa5b1")
    curve(left, held_out, "val_loss", "−ELBO, held out", color="#2563eb", marker="o", markersize=3)
    curve(left, held_out, "val_reconstruction", "reconstruction, held out", color="#ea580c", marker="o", markersize=3)
    left.set_title("nats per token")
    curve(middle, held_out, "val_kl", "KL, held out", color="#2563eb", marker="o", markersize=3)
    top = max(each["val_kl"] for each in held_out)
    weights = [each["kl_weight"] * top for each in trained]
    middle.plot([each["step"] for each in trained], weights, label="its weight (top = 1)", color="#9aa5b1")
    middle.set_title("nats per sentence")
    curve(right, held_out, "val_accuracy", "next token right, held out", color="#2563eb", marker="o", markersize=3)
    right.set_title("share of tokens")
    for axes in (left, middle, right):
        axes.set_ylim(bottom=0, top=7 if axes is left else None)
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.grid(axis="y", color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=110)


def main() -> None:
    """Print samples, interpolations and scores; draw the curve if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="dataset whose validation split is reconstructed")
    parser.add_argument("--image", type=Path, help="where to draw the curve")
    arguments = parser.parse_args()
    vae, data = jaxllm.load(arguments.run), Dataset.open(arguments.data, "validation")
    texts = [vae.tokenizer.decode(data.tokens(index).tolist()) for index in range(len(data))]
    found = reconstruction(vae, texts)
    for text, other in list(zip(texts, found, strict=True))[:10]:
        print(f"  {text}\n    -> {other}")
    print("from the prior, seed 0", *vae.sample(8), sep="\n  ")
    for one, other in PAIRS:
        print("on the way", *vae.interpolate(one, other, 7), sep="\n  ")
    if arguments.image:
        draw(arguments.run, arguments.image)


if __name__ == "__main__":
    main()
