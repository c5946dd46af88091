"""mdBook's preprocessor for links out of the book: `../README.md` in a chapter becomes the repository's page."""

import json
import posixpath
import re
import sys

LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")


def rewritten(text, chapter, source, repository):
    folder = posixpath.dirname(posixpath.join(source, chapter))

    def link(found):
        before, target, after = found.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        inside = path == source or path.startswith(source + "/")
        return found[0] if inside else f"{before}{repository}/blob/main/{path}{after}"

    # What stands in a block of code is no link.
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def walk(items, source, repository):
    for item in items:
        chapter = item.get("Chapter") if isinstance(item, dict) else None
        if chapter and chapter["path"]:
            chapter["content"] = rewritten(chapter["content"], chapter["path"], source, repository)
            walk(chapter["sub_items"], source, repository)


def main():
    if sys.argv[1:2] == ["supports"]:
        return
    context, book = json.load(sys.stdin)
    config = context["config"]
    repository = config["output"]["html"]["git-repository-url"]
    walk(book["items"], config["book"]["src"], repository)
    json.dump(book, sys.stdout)


main()
