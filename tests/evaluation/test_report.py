"""The page is complete, valid, self-contained, and says what the records say."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxllm.core.page import amount, duration
from jaxllm.evaluation import charts, report
from jaxllm.evaluation.report import Exchange, Report, Stage, write_report
from jaxllm.training.metrics import MetricsWriter, read

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = "<script>alert('x')</script> & \"quotes\" {{ 7 * 7 }} \x00\x1b[31m \u202e right-to-left 小红说：“你好”"
SCORES = {"translation": {"base": 0.0, "tuned": 0.9, "n": 100}, "qa": {"base": 0.25, "tuned": 0.5, "n": 20}}


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, addresses and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.references, self.words = [], [], [], []
        self.tags = set()
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "clip-path", "srcset", "action", "data"):
                self.references.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def make_run(run_dir, *, steps, prompts, start=9.0, end=1.4, tokens=4096):
    """Write the files of a run whose loss falls from `start` to `end`; return it as a stage."""
    run_dir.mkdir()
    noise = np.random.default_rng(0)
    writer = MetricsWriter(run_dir)
    for step in range(1, steps + 1):
        share = step / steps
        loss = (end + (start - end) * np.exp(-7 * share)) * np.exp(noise.normal(0, 0.05))
        lr = 3e-3 * min(step / (0.05 * steps), 1.0) * 0.5 * (1 + np.cos(np.pi * share))
        writer.metrics(step, {"loss": loss, "lr": lr, "grad_norm": 1.0, "tokens": tokens}, board=False)
        if step % 10 == 0:
            writer.timing(step, {"elapsed_s": 0.1 * step, "tokens_per_s": 41_000 + noise.normal(0, 900)})
        if step % max(steps // 8, 1) == 0:
            writer.metrics(step, {"val_loss": loss + 0.05, "val_bits_per_byte": loss / 2.4}, board=False)
            for prompt, text in prompts:
                writer.sample(step, prompt, text[: max(1, round(share * len(text)))])
    writer.close()
    (run_dir / "recipe.yaml").write_text("out: runs/x\nmodel:\n  d_model: 256\n", encoding="utf-8")
    records = {name: read(run_dir / f"{name}.jsonl") for name in ("metrics", "timing", "samples")}
    return Stage(run_dir.name.capitalize(), **records, recipe=(run_dir / "recipe.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return make_run(
        tmp_path_factory.mktemp("runs") / "pretraining",
        steps=40,
        prompts=[(HOSTILE, HOSTILE), ("从前", "从前有一只红色的球。")],
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory, stage):
    results = {"tasks": SCORES, "pretrain_only": SCORES, "seconds": 272.4, "tokens": 12_345_678, "parameters": 6.4e6}
    exchange = Exchange("qa", HOSTILE, HOSTILE + "\ud800", HOSTILE, "expected & right", correct=False)
    everything = Report(
        "A <b>title</b>", (stage, stage), results, (exchange,), next_steps=(("Talk", "run 'a' > \"b\" && c"),)
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, everything)
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_loads_nothing(page):
    parsed = Page(page)
    assert not parsed.tags & {"script", "iframe", "object", "img", "link", "style\n"}
    inside = {f"#{name}" for name in parsed.ids} | {f"url(#{name})" for name in parsed.ids}
    assert set(parsed.references) <= inside
    assert not re.findall(r"@import|url\((?!#)", page)
    assert "default-src 'none'" in page
    assert parsed.tags >= {"svg", "table", "figure", "details"}


def test_everything_a_model_writes_is_escaped(page):
    assert "alert(" in page and "<script" not in page
    assert "A &lt;b&gt;title" in page and "{{ 7 * 7 }}" in page
    assert "\x00" not in page and "␀␛[31m" in page
    assert 'lang="zh-Hans">从前' in page
    assert "&amp;&amp; c" in page


def test_numbers(page):
    words = " ".join(" ".join(Page(page).words).split())
    assert "solves 83.3 % of 120 exercises" in words.replace("%", " %").replace("  ", " ")
    assert re.search(r"it solved 4(\.\d+)?%", words)
    for value in ("12.3 million", "6.4 million", "4 min 32 s", "Translation", "Question answering", "✗ wrong"):
        assert value in words
    assert "Words that only pretraining has seen" in words and "Does pretraining matter?" not in words
    assert re.search(
        r"40 steps\. Training loss \d\.\d{3} at the end, validation loss \d\.\d{3} \(\d\.\d{3} bits", words
    )


def test_a_column_that_nothing_was_measured_for_is_left_out(stage):
    columns = lambda scores: Page(report.render(Report("t", (stage,), {"novel": scores}))).words
    assert {"before", "after"} <= {*columns(SCORES)}
    alone = columns({"qa": {"tuned": 0.9, "n": 100}})
    assert "after" in alone and not {"before", "–"} & {*alone}


def test_wrong_answers_are_shown_with_what_was_expected(stage):
    failures = {
        "translation": [{"prompt": f"ask {i}", "got": f"got {i}", "expected": f"right {i}"} for i in range(10)],
        "qa": [{"prompt": "who?", "got": "Tom <i>", "expected": "Anna"}],
    }
    words = " ".join(Page(report.render(Report("t", (stage,), {"tasks": SCORES, "failures": failures}))).words)
    assert "20 of the 120 exercises of the first table; 3 of them are below." in words
    assert all(each in words for each in ("ask 0", "got 0", "right 1", "who?", "Tom <i>", "Anna"))
    assert "ask 2" not in words

    perfect = {"qa": {"tuned": 1.0, "n": 200}}
    words = report.render(Report("t", (stage,), {"tasks": perfect, "failures": {"qa": []}}))
    assert "None of the 200 exercises of the first table." in words
    assert "got wrong" not in report.render(Report("t", (stage,), {"tasks": perfect}))


def test_the_pretrained_model_is_shown_at_what_it_can_do(stage):
    asked = Exchange("qa", "Who?", "before", "after", "after", correct=True)
    page = report.render(Report("t", (stage,), {}, (asked,), ("Anna saw", " a <dog>.")))
    assert '<span class="prompt">Anna saw</span> a &lt;dog&gt;.' in page and "how well, the first card shows" in page
    alone = report.render(Report("t", (stage,), {}, (replace(asked, before=""),), ("Anna saw", " a dog.")))
    assert "Anna saw" not in alone and "pretrained model" not in alone


def test_a_note_stands_below_the_losses(stage):
    page = report.render(Report("t", (replace(stage, note="Not of the same texts."),), {}))
    assert re.search(r"bits per byte\)\. Not of the same texts\.</figcaption>", page)


def test_colours_follow_the_theme(page):
    svg = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "var(--series-1)" in svg and "var(--series-2)" in svg and "var(--muted)" in svg
    assert not re.findall(r"#[0-9a-f]{6}\b", svg)
    assert "font-family" not in svg and "<style" not in svg
    used, declared = set(re.findall(r"var\((--[\w-]+)\)", page)), re.findall(r"(--[\w-]+):", page)
    assert used <= set(declared)
    themed = [name for name in declared if declared.count(name) == 2]
    assert {f"--{name}" for name in (*charts.SERIES, "ink", "muted", "grid")} <= set(themed)


def test_same_input_same_page(stage):
    everything = Report("x", (stage,), {})
    assert report.render(everything) == report.render(everything)


def test_page_of_the_least(tmp_path):
    stage = Stage("Only", [{"step": 1, "loss": 2.0, "lr": 0.1}])
    write_report(tmp_path / "r.html", Report("t", (stage,), {}))
    parsed = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "table" not in parsed.tags and "details" not in parsed.tags and "svg" in parsed.tags


def test_losses_that_are_no_numbers_leave_a_gap():
    records = [{"step": i, "loss": loss, "lr": 0.1} for i, loss in enumerate((3.0, "nan", "inf", 2.0, 1.0))]
    assert "1.000 at the end" in report.render(Report("t", (Stage("s", records),), {}))


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="no stages; give at least one"):
        write_report(tmp_path / "r.html", Report("t", (), {}))
    with pytest.raises(ValueError, match="'Tuning' has no training loss"):
        write_report(tmp_path / "r.html", Report("t", (Stage("Tuning", [{"step": 1, "val_loss": 1.0}]),), {}))


def test_smooth_is_a_centred_mean_of_what_is_known():
    np.testing.assert_allclose(charts.smooth([1, 2, 6, np.nan, 4], 3), [1.5, 3, 4, 5, 4])
    np.testing.assert_allclose(charts.smooth([1, 2, 4], 1), [1, 2, 4])
    assert np.isnan(charts.smooth([np.nan, np.nan], 1)).all()


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (6_391_808, "6.39 million"), (7.2e9, "7.2 billion")])
def test_amounts(number, text):
    assert amount(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.4, "8 s"), (272, "4 min 32 s"), (59.6, "1 min 0 s"), (7261, "2 h 1 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_diary_keeps_first_and_last():
    samples = [{"step": step, "prompt": "p", "text": str(step)} for step in range(1, 101)]
    ((prompt, records),) = report._diaries(samples)
    assert prompt == "p" and len(records) == report.MAX_SAMPLES
    assert (records[0]["step"], records[-1]["step"]) == (1, 100)
