"""A messy corpus end to end: real English and Chinese text with copies, edited copies, pages and junk put in.

    python tools/bench/junk_recall.py ../shared/data --out runs/junk

Writes the corpus, prepares it with configs/web.yaml, and counts what is left by the id of each document.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from cleaning import good, junk

NAV = "<nav><ul><li><a href='/'>Home</a></li><li><a href='/news'>News</a></li><li><a href='/a'>Shop</a></li></ul></nav>"
FOOT = "<footer><p>Copyright 2026 Example Ltd. All rights reserved. <a href='/privacy'>Privacy policy</a></p></footer>"


def corpus(data: Path, draw: random.Random) -> tuple[list[dict], list[dict], list[str]]:
    """Return (rows, rows that become web pages, evaluation texts); the kind of each is in its id."""
    texts = [(kind, text) for kind, text in good(data) if "short" not in kind and "paragraph" not in kind]
    draw.shuffle(texts)
    rows = [{"id": f"good {kind} {n}", "text": text} for n, (kind, text) in enumerate(texts)]
    some = lambda count: draw.sample(range(len(texts)), count)
    rows += [{"id": f"copy {n}", "text": texts[n][1]} for n in some(150)]
    rows += [{"id": f"edited {n}", "text": edited(texts[n][1], draw)} for n in some(150)]
    rows += [{"id": f"junk {kind} {n}", "text": text} for n, (kind, text) in enumerate(junk(texts, 40))]
    held = some(60)
    evaluation = [texts[n][1][200:600] for n in held]
    pages = [{"id": f"page {n}", "text": texts[n][1]} for n in held[:30]]  # a copy of these texts, in HTML
    marked = {f"good {texts[n][0]} {n}" for n in held}
    rows = [{**row, "id": f"contaminated {row['id']}"} if row["id"] in marked else row for row in rows]
    draw.shuffle(rows)
    rows.sort(
        key=lambda row: not row["id"].startswith(("good", "contaminated"))
    )  # originals first, then what repeats them
    return rows, pages, evaluation


def edited(text: str, draw: random.Random) -> str:
    """Return `text` with a word or character changed in about every 150, and something before it."""
    parts = text.split(" ") if text.isascii() or " " in text[:200] else list(text)
    for _ in range(max(1, len(parts) // 150)):
        parts[draw.randrange(len(parts))] = "X"
    return "Updated. " + (" " if " " in text[:200] else "").join(parts)


def main() -> int:
    """Write, prepare, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/junk"))
    arguments = parser.parse_args()
    out, draw = arguments.out, random.Random(0)
    rows, pages, evaluation = corpus(arguments.data, draw)
    (out / "pages").mkdir(parents=True, exist_ok=True)
    for number in range(8):  # eight inputs, for as many workers
        lines = [
            json.dumps(row, ensure_ascii=False) + "\n"
            for row in rows[len(rows) * number // 8 : len(rows) * (number + 1) // 8]
        ]
        (out / f"rows-{number}.jsonl").write_text("".join(lines), encoding="utf-8")
    for page in pages:
        body = "".join(f"<p>{part}</p>" for part in page["text"].split("\n") if part.strip())
        html = f"<html><head><title>t</title></head><body>{NAV}<article>{body}</article>{FOOT}</body></html>"
        (out / "pages" / f"{page['id'].replace(' ', '-')}.html").write_text(html, encoding="utf-8")
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in evaluation)
    (out / "evaluation.jsonl").write_text("".join(lines), encoding="utf-8")
    start = time.perf_counter()
    command = [
        sys.executable, "-m", "jaxllm.prepare", "configs/web.yaml", f"out={out}/dataset", "overwrite=true",
        f"inputs.0.path={out}/rows-*.jsonl", "inputs.1.kind=html", f"inputs.1.path={out}/pages/*.html",
        "decontaminate.against.0.kind=jsonl", f"decontaminate.against.0.path={out}/evaluation.jsonl",
        "tokenizer.vocab_size=16000",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    print(f"\n{time.perf_counter() - start:.1f} s")
    files = (out / "dataset").glob("*/*.origins.jsonl")
    origins = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").strip().split("\n")]
    left = Counter(kind(origin.get("id") or "page") for origin in origins)
    total = Counter(kind(row["id"]) for row in rows) + Counter({"page": len(pages)})
    for name in sorted(total):
        print(f"{name:24s} {total[name]:5d} put in, {left[name]:5d} left")
    return 0


def kind(name: str) -> str:
    """Return what a document is, of its id."""
    return " ".join(part for part in name.split() if not part.isdigit())


if __name__ == "__main__":
    sys.exit(main())
