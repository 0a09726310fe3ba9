"""What the presets of cleaning drop of good text, what of junk, and how fast each rule is.

    python tools/bench/cleaning.py ../shared/data

Good: Wikipedia articles and paragraphs, news, a play, a novel, English and Chinese. Junk: made of them, of seven kinds.
"""

import base64
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from jaxllm.data.cleaning.clean import CleanConfig, Cleaner, rules
from jaxllm.data.cleaning.language import identify
from jaxllm.data.documents import Document
from jaxllm.data.prepare import prepare
from jaxllm.data.prepare_config import BytesTokenizer, PrepareConfig
from jaxllm.data.reading.sources import RowFiles

PRESETS = ("c4", "gopher", "fineweb")
MENU = "Home\nProducts\nAbout us\nContact\nSign in\nSearch\nCart (0)\nPrivacy policy\nEN | DE | FR\nShare\nFollow us\n"
MENU_ZH = "首页\n产品\n关于我们\n联系\n登录\n搜索\n购物车\n隐私政策\n分享\n下载\n注册\n更多\n"


def good(data: Path) -> Iterator[tuple[str, str]]:
    """Yield (kind, text)."""
    text = (data / "text/en/wikitext2_valid.txt").read_text().replace(" \n", "\n")
    text = re.sub(r" @(.)@ ", r"\1", text)  # the file is cut into tokens; as it was before:
    text = re.sub(r"([(\[]) | (?=[,.;:!?)\]']|'s|n't)", r"\1", text)
    yield from (("wikipedia en", part) for part in text.split("\n = ") if len(part) > 400)
    for name, kind in (
        ("xquad_en_32", "paragraph en"),
        ("xquad_zh_32", "paragraph zh"),
        ("cmrc2018_trial", "wikipedia zh"),
    ):
        content = json.loads((data / f"qa/{name}.json").read_text())["data"]
        yield from ((kind, part["context"]) for each in content for part in each["paragraphs"])
    rows = map(json.loads, (data / "classify/ag_news_dev.jsonl").read_text().strip().split("\n"))
    yield from (("news en (short)", row["text"]) for row in rows)
    for name, kind in (("en/tinyshakespeare", "play en"), ("zh/hongloumeng_400k", "novel zh")):
        text = (data / f"text/{name}.txt").read_text()
        yield from ((kind, text[at : at + 3000]) for at in range(0, len(text), 3000))


def junk(texts: list[tuple[str, str]], count: int = 200) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) made of good texts, the same each time."""
    draw = random.Random(0)
    for _ in range(count):
        english, chinese = (draw.choice([text for kind, text in texts if kind[-2:] == code]) for code in ("en", "zh"))
        words = draw.sample(english.split(), 5)
        yield "menu", MENU * 6
        yield "menu", MENU_ZH * 6
        yield "base64", base64.b64encode(draw.randbytes(2000)).decode()
        yield "keywords", " ".join(draw.choice(words) for _ in range(300))
        yield "keywords", "".join(draw.choice(["特价", "优惠", "正品", "包邮", "代购"]) for _ in range(300))
        yield "mojibake", chinese.encode("utf-8").decode("latin-1")
        yield "lorem ipsum", "Lorem ipsum dolor sit amet, consectetur adipiscing elit. " * 20
        yield "repeated", (english[:150] + "\n") * 12
        yield "repeated", (chinese[:60] + "\n") * 12
        yield "numbers", "\n".join(" ".join(f"{draw.random():.4f}" for _ in range(8)) for _ in range(60))


def share(texts: list[tuple[str, str]], preset: str) -> dict[str, str]:
    """Return for each kind the share that `preset` drops, and by which rules."""
    cleaner, total, dropped = Cleaner(CleanConfig(preset=preset, deduplicate=False)), Counter(), Counter()
    why: dict[str, Counter] = {}
    for kind, text in texts:
        before = {name: count.dropped for name, count in cleaner.counts.items()}
        total[kind] += 1
        if cleaner.document(Document(text, kind, "")) is None:
            dropped[kind] += 1
            why.setdefault(kind, Counter()).update(
                name for name, count in cleaner.counts.items() if count.dropped > before[name]
            )
    most = {kind: ", ".join(f"{name} {n}" for name, n in counts.most_common(3)) for kind, counts in why.items()}
    return {kind: f"{dropped[kind] / n:6.1%} of {n:4d}  {most.get(kind, '')}" for kind, n in total.items()}


def speed(work: Callable[[str], object], texts: list[str]) -> float:
    """Return MB/s of UTF-8 and of processor time, the best of three."""
    size, best = sum(len(text.encode()) for text in texts), 0.0
    for _ in range(3):
        start = time.process_time()
        for text in texts:
            work(text)
        best = max(best, size / 1e6 / (time.process_time() - start))
    return best


def by_workers(texts: list[str], workers: int, megabytes: float = 16) -> tuple[float, float]:
    """Return the wall and CPU seconds that `prepare` takes to clean one file of about so many megabytes."""
    times = max(1, round(megabytes * 1e6 / sum(len(text.encode()) for text in texts)))
    cpu = lambda: sum(os.times()[:4])
    with TemporaryDirectory() as place:
        with open(f"{place}/a.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts * times)
        config = PrepareConfig(
            inputs=(RowFiles(path=file.name),), out=f"{place}/out", tokenizer=BytesTokenizer(),
            clean=CleanConfig(preset="gopher", languages=("any",), deduplicate=False), engine={"workers": workers},
        )  # fmt: skip
        wall, busy = time.perf_counter(), cpu()
        prepare(config)
        return time.perf_counter() - wall, cpu() - busy


def main() -> int:
    """Measure and print."""
    texts = list(good(Path(sys.argv[1])))
    bad = list(junk(texts))
    for preset in PRESETS:
        for title, some in (("good", texts), ("junk", bad)):
            print(f"\n{preset}, {title} text that is dropped")
            for kind, line in share(some, preset).items():
                print(f"  {kind:16s} {line}")
    config = CleanConfig(
        preset="fineweb",
        repair=True,
        tags=True,
        width=True,
        nfc=True,
        pii=("email", "phone", "ip", "key", "id", "card"),
    )
    work = dict(rules(config)) | {"language": identify}
    for preset in PRESETS:
        work[f"quality: {preset}"] = CleanConfig(preset=preset).quality.failed
    print("\nMB/s on one core        english  chinese")
    kinds = [[text for kind, text in texts if kind[-2:] == code] for code in ("en", "zh")]
    for name, rule in work.items():
        print(f"  {name:20s} {speed(rule, kinds[0]):8.1f} {speed(rule, kinds[1]):8.1f}")
    for workers in (1, 2):
        wall, busy = by_workers([text for _, text in texts], workers)
        print(f"one file, {workers} workers: {wall:.1f} s, {busy:.1f} s of CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
