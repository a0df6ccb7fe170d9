"""Makes docstrings read well as Markdown on the site."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Docstrings(Extension):
    """Turns the "::" before a block of code, which plain text and reStructuredText have, into ":"."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^::\n\n|(?<=:):$", "", obj.docstring.value, flags=re.MULTILINE)
