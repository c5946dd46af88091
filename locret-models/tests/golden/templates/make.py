"""What Jinja makes of the templates in golden.json, with the settings that transformers gives it.

    python3 make.py

Packages: jinja2 3.1.6. Reads `variables` and the `source` of each of `cases` in golden.json beside this
script, and writes what they become: `text`, or null where Jinja refuses.
"""

import datetime
import json
import pathlib

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

GOLDEN = pathlib.Path(__file__).parent / "golden.json"


class Generation(jinja2.ext.Extension):
    """What the assistant says, for training."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_plain"), [], [], body).set_lineno(line)

    def _plain(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def render(environment, source, variables):
    try:
        return environment.from_string(source).render(**variables)
    except Exception:
        return None


def main():
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.datetime(2024, 7, 6).strftime
    golden = json.loads(GOLDEN.read_text())
    for case in golden["cases"]:
        case["text"] = render(environment, case["source"], golden["variables"])
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
