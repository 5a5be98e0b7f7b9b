"""Pages that open without a network, rendered by Jinja2. A template is a file beside the module that fills it in.

Whatever a template is given is escaped; a piece that is rendered already (:class:`markupsafe.Markup`) is not. A name
that a template uses and is not given is an error. Nothing here knows what a page is about. May import ``errors`` only.
"""

from __future__ import annotations

from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(package: str, template: str, **values: object) -> Markup:
    """A template filled in.

    Args:
        package: where the template is; it may extend ``base.html`` of this package.
        template: name of its file.
        values: what it names.
    """
    return Markup(_environment(package).get_template(template).render(values))


@cache
def _environment(package: str) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, "") for name in (package, __name__)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment
