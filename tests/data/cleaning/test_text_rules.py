"""Rules that change a text, and the masking of personal data."""

import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.data.cleaning import pii
from jaxllm.data.cleaning.clean import CleanConfig, Cleaner
from jaxllm.data.cleaning.pii import mask
from jaxllm.data.cleaning.text_rules import convert, narrow, remove_tags, repair
from jaxllm.data.documents import Document

PEM = "-----BEGIN PRIVATE KEY-----"


def test_mojibake_is_repaired_and_good_text_is_left_alone():
    pytest.importorskip("ftfy")
    for text in ("schön, naïve – “quoted”", "今天天气很好", "ＡＢＣ１２３，全角！", "plain"):
        assert repair(text) == text
    assert repair("schÃ¶n") == "schön"
    broken = "今天天气很好，我们去公园".encode().decode("latin-1")
    assert repair(f"schön\n{broken}\nplain") == "schön\n今天天气很好，我们去公园\nplain"
    # What it needs are control characters: no other rule may take them away before.
    assert Cleaner(CleanConfig(repair=True, nfc=True)).document(Document(broken, "a", "b")).text[:4] == "今天天气"


def test_tags_and_entities():
    page = '<p class="a">One &amp; two<br/>three</p><!-- no --><script>var x = "<p>";</script><STYLE>p {}</STYLE>四'
    assert remove_tags(page) == "One & twothree四"
    kept = "#include <stdio.h> if a < b and c > d: vector<int> <name>"
    assert remove_tags(kept) == kept


def test_width_narrows_letters_and_digits_only():
    assert narrow("ＡＢｃ０９，。！？（）：　") == "ABc09，。！？（）：　"


def test_chinese_characters_stay_unless_asked():
    pytest.importorskip("opencc")
    assert Cleaner(CleanConfig()).document(Document("漢字汉字", "a", "b")).text == "漢字汉字"
    assert convert("漢字 abc", "simplified") == "汉字 abc"
    assert Cleaner(CleanConfig(chinese="traditional")).document(Document("汉字", "a", "b")).text == "漢字"


@pytest.mark.parametrize(
    ("kind", "found", "kept"),
    [
        ("email", ["a.b+c@mail.example.org", "王@没有 x@y.cn", "x@mail.net.", "x@y.com(home)", "x@y.org[1]",
                   "x@png.org", "_x@y.org_"],
         ["@name", "a@b", "x@@y.z", "icon@2x.png", "icon@1.5x.min.webp", "logo@large.svg", "+@app.get",
          "W@x.reshape(1)", "W@x.T", "W@x.grad.sum(0)", "W@x.shape[0]", "git@github.com:a/b",
          "sd_IN@devanagari.UTF-8"]),
        ("phone", ["+1 (415) 555-0132", "415-555-0132", "(415) 555-0132", "+86 138 1234 5678", "13812345678",
                   "138-1234-5678", "010-62345678",
                   "1-800-555-1234", "1 (800) 555-1234", "1.800.555.1234", "415.555.0132", "+1.415.555.0132",
                   "+1 415.555.0132", "+14155550132", "+33 1 23 45 67 89", "+44 (0)20 7946 0958", "+86-10-62345678",
                   "+4512345678"],
         ["3.14159265358", "2024-01-02", "12:30:45", "1234567890123", "3.13812345678", "ISBN 978-3-16-148410-0",
          "p = +0.12345", "lat +37.7749,", "lon +122.41941234", "gain +123456 units", "+12 345", "+0 12345 67890",
          "mean 123.456.7890", "415.055.0132", "population 15000000000", "+1234567890123456", "+12345678.25"]),
        ("ip", ["8.8.8.8", "2001:4860:4860::8888", "IP: 8.8.8.8", "http://8.8.8.8/", "host=8.8.8.8", "Driver 8.8.8.8",
                "update: 8.8.8.8", "server-8.8.8.8", "host/8.8.8.8", "Host/8.8.8.8", "vs 8.8.8.8",
                "the new version\n8.8.8.8", "8.8.8.8-8.8.4.4", "[2606:4700::1111]:80", "2001:4860:4860::8888.",
                "version 2001:4860:4860::8888", "2001:4860:4860::8888: no route", "2001:4860:4860:0:0:0:0:8888"],
         ["192.168.0.1", "224.0.0.1", "v1.2.3.4", "v. 1.2.3.4", "version 1.2.3.4", "Versions: 1.2.3.4",
          "Chrome/1.2.3.4", "a==1.2.3.4", "pkg-1.2.3.4.tar.gz", "pkg-1.2.3.4-py3-none-any.whl",
          "pkg-1.2.3.4-5.el8.x86_64.rpm", '__version__ = "1.2.3.4"', '"version": "1.2.3.4"', "§ 1.2.3.4",
          "build 1.2.3.4", "Section 1.2.3.4", "rfc7231#section-7.1.1.1", "版本1.2.3.4", "第 1.2.3.4", "1.2.3",
          "999.1.1.1", "12:30", "::1", "x[::2]", "a[1::2]", "a[2000::2]", "class A::B {", "Ad::fe", "A100::B200",
          "2000::B200", "fe80::1:2:3", "2001:db8::1:2", "2001:12:30", "2001:4860:4860:8888"]),
        ("key", ["sk-abcdefghijklmnopqrstuvwx", "sk-proj-abcdefghijklmnopqrstuvwx", "AKIAABCDEFGHIJKLMNOP",
                 "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
                 f"-----BEGIN PRIVATE KEY-----\n{'x' * 9000}\n-----END PRIVATE KEY-----",
                 "-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: 1\n\nx\n-----END PGP PRIVATE KEY BLOCK-----",
                 f"-----BEGIN RSA PRIVATE KEY-----\\n{'a' * 64}\n{'b' * 64}"],
         ["sk-learn", "AKIA", "task-abc", "-----BEGIN RSA PRIVATE KEY----- is how it begins"]),
        ("id", ["11010519491231002X"], ["110105194912310021", "123456789012345678"]),
        ("card", ["4111111111111111", "5500-0000-0000-0004", "3782 822463 10005", "2223003122003222",
                  "6011111111111117", "6222021234567890128", "6222 0212 3456 7890 128", "622202 1234567890128",
                  "4222222222222", "No.4111 1111 1111 1111"],
         ["4111111111111112", "94111111111111111", "4111-1111", "years 2010 2011 2012 2013 2014",
          "1111 1111 1111 1117", "3530111333300000", "4111111111111111.5", "4111 1111-1111 1111"]),
    ],
)  # fmt: skip
def test_personal_data(kind, found, kept):
    masked = mask([kind])
    for text in found:
        assert f"[{kind}]" in masked(f"so: {text}, then")
    for text in kept:
        assert masked(f"so: {text}, then") == f"so: {text}, then"
    everything = mask(["email", "phone", "ip", "key", "id", "card"])
    assert everything(f"电话{found[0]}。") == f"电话[{kind}]。"


@pytest.mark.parametrize(
    ("kind", "text", "rest"),
    [
        ("key", "a sk-proj-abcdefghij1234567890-ABCDEFGHIJ1234567890zzzz b", "a [key] b"),
        ("key", "a sk-ant-api03-Ab1_cD2-eF3_gH4-iJ5kL6_mN7-oP8qR9sT0uV1-wX2yZ3_xxAA.", "a [key]."),
        ("key", "a sk-abcdefghijklmnopqrst_uvw-xyz b", "a [key] b"),
        ("card", "order 2019 4111 1111 1111 1111 now", "order 2019 [card] now"),
        ("card", "order 4019 4111 1111 1111 1111 now", "order 4019 [card] now"),
        ("card", "4111 1111 1111 1111 123", "[card] 123"),
        ("card", "6250 9410 0652 8599 124", "[card] 124"),
        ("card", "6222 0212 3456 7890 128 now", "[card] now"),
        ("card", "622202 1234567890040", "622202 1234567890040"),
        ("ip", "192.168.0.1 8.8.8.8", "192.168.0.1 [ip]"),
        ("phone", "+86 138 1234 5678 and +12 345, 415-555-0132", "[phone] and +12 345, [phone]"),
    ],
)
def test_nothing_of_it_is_left_and_what_stands_around_it_stays(kind, text, rest):
    assert mask([kind])(text) == rest


@pytest.mark.parametrize("kind", pii._PATTERNS)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_a_pattern_finds_has_its_sign(kind, data):
    pattern, sign = (re.compile(each[kind], re.ASCII) for each in (pii._PATTERNS, pii._SIGNS))
    found = pattern.search(data.draw(st.from_regex(pattern)))
    assert found is None or sign.search(found.string)


def test_masking_is_counted_and_off_by_default():
    document = Document("mail me@example.org", "a", "b")
    assert Cleaner(CleanConfig()).document(document).text == document.text
    cleaner = Cleaner(CleanConfig(pii=["email"]))
    assert cleaner.document(document).text == "mail [email]"
    assert cleaner.counts["pii"].changed == 1


@pytest.mark.parametrize(
    "part",
    [
        "sk-",
        "sk-aa-",
        "a@b.",
        "<!--",
        "<script>",
        "<!doctype ",
        "<p ",
        "1 ",
        "0:",
        "1.",
        PEM,
        f"{PEM}{'a' * 20}",
        "2000:",
        "4019 ",
        "+1 ",
        "8.8.8.8 ",
        "sk-ant-",
        "version ",
        "aa@2x.",
    ],
)
def test_rules_take_linear_time(part):
    start = time.perf_counter()
    remove_tags(part * 20_000)
    mask(["email", "phone", "ip", "key", "id", "card"])(part * 20_000)
    assert time.perf_counter() - start < 2  # quadratic: 7 seconds or more
