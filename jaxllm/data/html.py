"""The text of a web page."""

from jaxllm.core.extras import extra


def extract_text(html: str | bytes) -> str:
    """Return the main content of a page as plain text.

    Args:
      html: the page; of bytes the encoding is detected.
    Raises:
      ValueError: the package that does it is not installed.
    """
    with extra("prep"):
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    if isinstance(html, bytes):
        html = bytes_to_str(html, detect_encoding(html, from_html_meta=True))
    return extract_plain_text(html, main_content=True)
