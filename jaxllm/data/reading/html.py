"""The text of a web page, without menus, headers, footers and scripts."""

from jaxllm.core.extras import extra

MAX_BAD = 0.25  # replaced characters per byte above 127: a broken page has a few, a wrong encoding nearly all


def extract_text(html: str | bytes) -> str:
    """Return the main content of a page as plain text; paragraphs, headings and list items are lines of their own.

    Args:
      html: the page; bytes are UTF-8 if they can be, then what the page declares, then what they look like.
    Raises:
      ValueError: the package that does it is not installed.
    """
    with extra("prep"):
        from resiliparse.extract.html2text import extract_plain_text
    page = _decode(html) if isinstance(html, bytes) else html.encode("utf-8", "replace").decode()
    return extract_plain_text(page, main_content=True).replace("\xa0", " ")


def _decode(data: bytes) -> str:
    from resiliparse.parse.encoding import detect_encoding

    allowed = MAX_BAD * len(data.translate(None, bytes(range(128))))
    # A guess comes last: one bad byte makes it take UTF-8 for a Western encoding, which never fails.
    for encoding in ("utf-8", detect_encoding(data, from_html_meta=True), detect_encoding(data)):
        try:
            text = data.decode(encoding, "replace").removeprefix("\ufeff")
        except LookupError:  # of the web's encodings, a few have no codec here
            continue
        if text.count("\ufffd") <= allowed:
            return text
    return data.decode("utf-8", "replace")
