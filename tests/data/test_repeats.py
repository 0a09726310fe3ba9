"""Near duplicates, repeated paragraphs and evaluation texts, through `prepare`."""

import json
import random
from pathlib import Path

import pytest

from jaxllm.data.prepare import prepare
from jaxllm.data.prepare_config import BytesTokenizer, PrepareConfig
from jaxllm.data.reading.sources import RowFiles

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "nrst"]


def text(seed, length=80):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(length))


def edited(seed):
    words = text(seed).split()
    words[40] = "other"
    return " ".join(words)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three files: originals, what repeats them, and evaluation texts."""
    monkeypatch.chdir(tmp_path)
    shared = "A paragraph that many pages have.\n" + text(99, 30)
    rows = {
        "a": {"one": text(1), "two": text(2), "three": text(3), "page": f"{text(4, 20)}\n\n{shared}"},
        "b": {"copy": text(2), "near": edited(1), "nearer": edited(1) + " end", "next": f"{text(5, 20)}\n\n{shared}",
              "tested": f"{text(6)}\n{text(7, 20)}\n{text(8)}", "only": shared},
    }  # fmt: skip
    for name, texts in rows.items():
        lines = (json.dumps({"id": key, "text": value}) + "\n" for key, value in texts.items())
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "evaluation.jsonl").write_text(json.dumps({"text": text(7, 20).upper()}) + "\n")
    return tmp_path


def config(out="out", **options):
    options = {"engine": {"kind": "local", "workers": 1}, **options}  # to start processes would cost most of the time
    return PrepareConfig(
        inputs=(RowFiles(path="a.jsonl"), RowFiles(path="b.jsonl")), out=out, tokenizer=BytesTokenizer(), validation=0,
        part_bytes=1, **options,
    )  # fmt: skip


def left(out="out"):
    [path] = Path(out).glob("train/*.origins.jsonl")
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def dropped(report):
    return {name: rule.dropped for name, rule in report.rules.items() if rule.dropped}


ALL = {"one", "two", "three", "page", "copy", "near", "nearer", "next", "tested", "only"}


def test_near_duplicates_go_and_the_first_stays(files):
    report = prepare(config(dedup={"near": True}))
    assert set(left()) == ALL - {"copy", "near", "nearer"}
    assert dropped(report) == {"duplicate": 1, "near_duplicate": 2}
    [cluster] = report.clusters
    assert cluster.size == 3
    assert [example.split(":")[0] for example in cluster.examples] == [
        "a.jsonl, line 1",
        "b.jsonl, line 2",
        "b.jsonl, line 3",
    ]
    assert "Largest groups of near duplicates" in (files / "out" / "report.html").read_text()


def test_what_is_kept_is_counted_by_input_to_the_end(files):
    again = [{"id": "one", "text": text(20)}, {"id": "one", "text": text(21)}, {"id": "one", "text": text(1)}]
    (files / "a.jsonl").open("a").writelines(json.dumps(row) + "\n" for row in again)
    against = {"against": [{"kind": "jsonl", "path": "evaluation.jsonl"}]}
    report = prepare(config(dedup={"near": True}, decontaminate=against, clean={"languages": ["any"]}))
    assert [each.documents_kept for each in report.inputs] == [6, 2]
    assert sum(each.bytes_kept for each in report.inputs) == report.bytes_kept
    assert sum(each.documents for each in report.languages.values()) == report.documents_kept == len(left()) == 8
    assert report.notes == (
        "2 documents kept with an id that an earlier one of the same input has; the first: a.jsonl, line 5, id one",
    )


def test_evaluation_texts_are_found_before_lines_go(files):
    speech = [f"Name{n}.\n{text(40 + n, 12)}." for n in range(4)]
    (files / "b.jsonl").write_text(json.dumps({"id": "play", "text": "\n".join([text(50), *speech])}) + "\n")
    (files / "evaluation.jsonl").write_text(
        json.dumps({"text": "\n".join(speech[1:3])[-90:]}) + "\n" + '{"text": "six words are not looked for"}\n'
    )
    against = {"against": [{"kind": "jsonl", "path": "evaluation.jsonl"}]}
    report = prepare(config(clean={"lines": {"min_words": 3}}, decontaminate=against))
    assert "play" not in left() and report.rules["contaminated"].dropped == 1
    assert report.notes[-1].startswith("1 of 2 evaluation texts of jsonl evaluation.jsonl have fewer than 8 words")


def test_paragraphs_of_earlier_documents_go(files):
    report = prepare(config(dedup={"paragraphs": "blank_line", "paragraph_min_bytes": 40}))
    assert set(left()) == ALL - {"copy", "only"}
    assert report.rules["repeated_paragraph"].changed == 1
    assert dropped(report) == {"duplicate": 1, "repeated_paragraph": 1}
    assert report.bytes_kept == report.splits["train"].tokens - 2 * report.documents_kept


@pytest.mark.parametrize("action", ["drop", "cut"])
def test_evaluation_texts_are_kept_out(files, action):
    against = {"against": [{"kind": "jsonl", "path": "evaluation.jsonl"}], "action": action}
    report = prepare(config(decontaminate=against))
    rule = report.rules["contaminated"]
    if action == "drop":
        assert "tested" not in left()
        assert (rule.dropped, rule.changed) == (1, 0)
        assert rule.examples[0].startswith("b.jsonl, line 5: jsonl evaluation.jsonl: ")
    else:
        assert "tested" in left()
        assert (rule.dropped, rule.changed) == (0, 1)
        assert report.splits["train"].tokens == report.bytes_kept + 2 * report.documents_kept


def test_any_number_of_workers_and_beam_give_the_same_bytes(files):
    options = {
        "dedup": {"near": True, "paragraphs": "blank_line", "paragraph_min_bytes": 40},
        "decontaminate": {"against": [{"kind": "jsonl", "path": "evaluation.jsonl"}], "action": "cut"},
    }
    engines = [{"kind": "local", "workers": 1}, {"kind": "local", "workers": 2}]
    if pytest.importorskip("apache_beam"):
        engines.append({"kind": "beam"})
    made = []
    for number, engine in enumerate(engines):
        prepare(config(f"out{number}", engine=engine, **options))
        made.append({path.name: path.read_bytes() for path in files.glob(f"out{number}/train/*")})
    assert made[0] == made[1] == made[-1]


def test_evaluation_texts_are_written_as_the_documents_are(files):
    traditional = "這個學習問題的答案應該沒有人會說出來，因為書裡寫得很長。"
    rows = {"a": [{"text": f"前面。{traditional}後面。"}, {"text": "別的"}], "evaluation": [{"text": traditional}]}
    for name, each in rows.items():
        (files / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    against = {"against": [{"kind": "jsonl", "path": "evaluation.jsonl"}]}
    for chinese in ("simplified", "keep"):
        report = prepare(config(overwrite=True, clean={"chinese": chinese}, decontaminate=against))
        assert report.rules["contaminated"].dropped == 1
