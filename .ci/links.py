"""Checks links: `links.py REPOSITORY [BOOK]`.

In the repository's documents every relative link leads to a file, and to a heading where it names one. In
the built book every one leads to a page that is there, and to an id in it. Addresses elsewhere are not asked
for, but those of this repository's own files have to be files here.
"""

import html.parser
import pathlib
import re
import subprocess
import sys
import urllib.parse

OWN = "https://github.com/locret-rs/locret/blob/main/"
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def slug(heading):
    """A heading's name as GitHub and mdBook make it."""
    text = re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text))


def headings(path):
    text = FENCE.sub("", path.read_text("utf-8"))
    return {slug(line.lstrip("#")) for line in text.splitlines() if re.match(r"#{1,6} ", line)}


def documents(root):
    names = subprocess.check_output(["git", "-C", root, "ls-files", "-co", "--exclude-standard", "*.md"])
    for name in names.decode().split("\n"):
        path = root / name
        if name and path.is_file():
            for target in LINK.findall(FENCE.sub("", path.read_text("utf-8"))):
                yield path, target


def in_repository(root):
    for path, target in documents(root):
        if target.startswith(OWN):
            target = "/" + target.removeprefix(OWN)
        elif re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        base = root if name.startswith("/") else path.parent
        to = base / name.lstrip("/") if name else path
        if not to.exists():
            yield f"{path}: {target}: no such file"
        elif heading and to.suffix == ".md" and heading not in headings(to):
            yield f"{path}: {target}: no such heading"


class Page(html.parser.HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def in_book(root, book):
    # These two are made of all the others.
    paths = [path for path in book.rglob("*.html") if path.name not in ("print.html", "toc.html")]
    pages = {path.resolve(): Page(path) for path in paths}
    for path, page in pages.items():
        for link in page.links:
            if link.startswith(OWN) and not (root / link.removeprefix(OWN).partition("#")[0]).exists():
                yield f"{path}: {link}: no such file in the repository"
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            # 404.html is shown at any depth, so that its links begin at the site's root.
            base = book if path.name == "404.html" else path.parent
            to = (base / urllib.parse.unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            if not to.exists():
                yield f"{path}: {link}: no such page"
            elif parts.fragment and to in pages:
                if urllib.parse.unquote(parts.fragment) not in pages[to].ids:
                    yield f"{path}: {link}: no such place"


def main():
    root, *books = map(pathlib.Path, sys.argv[1:])
    wrong = [*in_repository(root), *(line for book in books for line in in_book(root, book))]
    print("\n".join(wrong) or "links: all there")
    sys.exit(bool(wrong))


main()
