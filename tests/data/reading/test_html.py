"""Pages to text: what is left out, lines, entities, and encodings that are declared, wrong, broken or missing."""

import pytest

from jaxllm.data.reading.html import extract_text

pytest.importorskip("resiliparse")

PAGE = """<!doctype html><html><head><meta charset="{charset}"><title>Title</title>
<style>p {{color: red}}</style></head><body><nav><a href="/">首页</a><a href="/p">产品中心</a></nav>
<header><ul class="menu"><li>登录</li></ul></header>
<main><article><h1>城北的河</h1><p>这条河发源于城北的山里，从十二世纪起就有人用它的水推磨。大部分磨坊是石头盖的。</p>
<p>The river &amp; the <b>old</b>&nbsp;mill: 3 &lt; 4, caf&eacute; &#8212; all<br>stand.</p></article></main>
<script>var x = "<p>hidden</p>";</script><footer>版权所有 <a href="/c">联系我们</a></footer></body></html>"""
TEXT = (
    "城北的河\n\n这条河发源于城北的山里，从十二世纪起就有人用它的水推磨。大部分磨坊是石头盖的。\n\n"
    "The river & the old mill: 3 < 4, café — all\nstand."
)


def test_main_content_as_lines():
    assert extract_text(PAGE.format(charset="utf-8")) == TEXT


@pytest.mark.parametrize(
    ("declared", "actual"),
    [("utf-8", "utf-8"), ("gbk", "gbk"), ("gb2312", "gb18030"), ("utf-8", "gbk"), ("gbk", "utf-8"),
     ("iso-8859-1", "utf-8"), ("no-such-thing", "utf-8"), ("utf-8", "utf-8-sig"), ("big5", "big5hkscs")],
)  # fmt: skip
def test_encoding_is_found_whatever_the_page_declares(declared, actual):
    simplified = actual != "big5hkscs"
    page = PAGE if simplified else "<meta charset={charset}><p>這條河發源於城北的山裡，從十二世紀起就有人用它的水。</p>"
    expected = TEXT if simplified else "這條河發源於城北的山裡，從十二世紀起就有人用它的水。"
    assert extract_text(page.format(charset=declared).encode(actual)) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "gbk"])
def test_a_bad_byte_costs_one_place_and_not_the_page(encoding):
    data = PAGE.format(charset=encoding).encode(encoding)
    at = data.index("河发源".encode(encoding))
    found = extract_text(data[:at] + b"\xff" + data[at:])
    assert "大部分磨坊是石头盖的。" in found
    assert "\ufffd" in found


@pytest.mark.parametrize("page", ["", b"", "plain", b"\x00\xff\xfe", "<p", "<" * 1000, "a\ud800b", "<p>" * 2000])
def test_no_page_breaks_it(page):
    assert isinstance(extract_text(page), str)
    assert extract_text("plain words") == "plain words"
