"""Templates: what they are given is escaped, and a name that they are not given is an error."""

from __future__ import annotations

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from fisedit_compiler.pages import render

PACKAGE = "fisedit_compiler.inspect.page"


def test_values_are_escaped_and_rendered_pieces_are_not() -> None:
    page = render("fisedit_compiler.pages", "base.html", title="</title><script>", sections={"x": Markup("<b>X</b>")})
    assert page.count("&lt;/title&gt;&lt;script&gt;") == 2 and "<script>" not in page
    assert '<a href="#x"><b>X</b></a>' in page


def test_a_name_without_a_value_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="events"):
        render(PACKAGE, "timeline.html")
