"""Makes the site's pages of files that lie elsewhere, and the links between them.

Every Markdown file of the repository links to files by relative paths, as GitHub reads them. Here a
link to a file that has a page becomes a link to the page; an image is copied; any other file is
linked where the repository is published.
"""

import base64
import concurrent.futures
import html
import importlib
import inspect
import os
import pathlib
import posixpath
import re
import tomllib
import types

import jupytext
import latex2mathml.converter
import nbclient
from mkdocs import exceptions
from mkdocs.structure import files as files_
from mkdocs.utils import get_relative_url
from mkdocstrings import Inventory

import soap_jax

ROOT = pathlib.Path(__file__).parents[2]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

PAGES = {  # what lies outside docs/, and its page
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples/index.md",
    **{f"examples/{path.name}": f"examples/{path.stem}.md" for path in EXAMPLES},
    **{f"examples/notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in NOTEBOOKS},
}
SOURCES = {page: source for source, page in PAGES.items()}
SHOWN = {"examples": "examples/index.md", "examples/notebooks": "notebooks/from_scratch.md"}

LINK = re.compile(r"(\]\()([^()\s]+)(\))")
FIGURE = re.compile(r'<img [^>]*src="([^"]+)"[^>]*>')
OBJECT = re.compile(r'(<span class="doc doc-object-name[^>]*>)([\w.]+)(</span>)')
EQUATION = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
CODE = re.compile(  # code in a line of text, and what holds code that is no reference
    r"<(a|h\d|pre)\b.*?</\1>|<code>(?P<name>[A-Za-z][\w.]*)(?:\([^<]*)?</code>", re.DOTALL
)
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)


def on_config(config):
    """Links to the repository, without the theme's own link, which asks GitHub for its stars."""
    config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": REPOSITORY}]
    return config


def on_files(files, config):
    """Adds the pages of files outside docs/."""
    show = read_notebook if os.environ.get("NOTEBOOKS") == "text" else run_notebook
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        executed = dict(zip(NOTEBOOKS, pool.map(show, NOTEBOOKS), strict=True))
    for path, (text, figures) in executed.items():
        add(files, config, f"notebooks/{path.stem}.md", text)
        for name, content in figures.items():
            add(files, config, f"notebooks/{name}", content)
    for source, page in PAGES.items():
        if source.endswith(".md"):
            add(files, config, page, (ROOT / source).read_text())
        elif source.startswith("examples/") and "notebooks" not in source:
            code = (ROOT / source).read_text()
            add(files, config, page, f"# {pathlib.Path(source).name}\n\n```python\n{code}```\n")
    for page in [file.src_uri for file in files.documentation_pages()]:
        for image in images_of(page, files):
            name = f"images/{image}"
            if files.get_file_from_path(name) is None:
                add(files, config, name, (ROOT / image).read_bytes())
    return files


def add(files, config, name, content):
    """Adds a file to the site."""
    files.append(files_.File.generated(config, name, content=content))


def images_of(page, files):
    """The repository's images outside docs/ that a page shows."""
    source = source_of(page)
    text = included(files.get_file_from_path(page).content_string, source)
    for _, link, _ in LINK.findall(FENCE.sub("", text)):
        target = resolve(source, link)
        if target and target.endswith(".png") and not target.startswith("docs/"):
            yield target


def source_of(page):
    """The file of the repository that a page is made of."""
    return SOURCES.get(page, f"docs/{page}")


def resolve(source, link):
    """The path in the repository that a link leads to, or None if it leads elsewhere."""
    if re.match(r"[a-z]+:|#", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link.split("#")[0]))
    return path if (ROOT / path).exists() else None


def page_of(target):
    """The page of a path in the repository, or None."""
    if target in PAGES:
        return PAGES[target]
    if target in SHOWN:
        return SHOWN[target]
    if target.startswith("docs/") and target.endswith(".md"):
        return target.removeprefix("docs/")
    module = re.fullmatch(r"soap_jax/(\w+)(?:\.py|/.*)?", target)
    if module and (ROOT / "docs" / "api" / f"{module[1]}.md").exists():
        return f"api/{module[1]}.md"
    return None


def included(text, source):
    """A page with the text of the files that it includes: `<!-- include: PATH -->`.

    Their titles are left out, and their links start from the page.
    """

    def content(match):
        path = ROOT / match[1]
        if not path.exists():
            raise exceptions.PluginError(f"{source} includes {match[1]}, which is not there.")

        def rebase(link):
            target = resolve(match[1], link[2])
            if target is None:
                return link[0]
            anchor = link[2].partition("#")[2]
            moved = posixpath.relpath(target, posixpath.dirname(source))
            return f"{link[1]}{moved}{'#' + anchor if anchor else ''}{link[3]}"

        body = re.sub(r"\A# .*\n", "", path.read_text())
        parts = FENCE.split(body)
        return "".join(p if i % 2 else LINK.sub(rebase, p) for i, p in enumerate(parts))

    return re.sub(r"<!-- include: (\S+) -->", content, text)


def on_page_markdown(markdown, page, config, files):
    """Leads a page's links to pages, images and the repository."""
    here, source = page.file.src_uri, source_of(page.file.src_uri)

    def replace(match):
        target = resolve(source, match[2])
        if target is None:
            return match[0]
        anchor = match[2].partition("#")[2]
        found = page_of(target)
        if found is None and target.endswith(".png"):
            found = target.removeprefix("docs/") if target[:5] == "docs/" else f"images/{target}"
        if found is None:
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            return f"{match[1]}{REPOSITORY}/{kind}/main/{target}{match[3]}"
        link = get_relative_url(found, here) + (f"#{anchor}" if anchor else "")
        return f"{match[1]}{link}{match[3]}"

    parts = FENCE.split(included(markdown, source))
    return "".join(p if i % 2 else LINK.sub(replace, p) for i, p in enumerate(parts))


def on_page_content(content, page, config, files):
    """Typesets equations as MathML, which browsers show without a script, and links names.

    Figures open in their full size, and dotted names in headings break only after dots.
    """

    def link(code):
        entry = entry_of(code["name"], page.file.src_uri) if code["name"] else None
        return f'<autoref identifier="{entry}" optional>{code[0]}</autoref>' if entry else code[0]

    content = FIGURE.sub(r'<a href="\1">\g<0></a>', content)
    short = short_names()
    content = OBJECT.sub(
        lambda m: f"{m[1]}{short.get(m[2], m[2]).replace('.', '.<wbr>')}{m[3]}", content
    )
    content = EQUATION.sub(
        lambda tex: latex2mathml.converter.convert(html.unescape(tex[1])), content
    )
    return CODE.sub(link, content)


def entry_of(name, page):
    """The entry in the API reference of a name such as "metrics.angle" or "SignSync", or None.

    Fails if a name that starts with "soap_jax." does not exist.
    """
    named = [entry for entry in public_names() if entry.rpartition(".")[2] == name]
    if name[0].isupper() and len(set(named)) == 1:
        return named[0]
    value = soap_jax
    for part in name.removeprefix("soap_jax.").split("."):
        value = getattr(value, part, None)
    if value is None and name.startswith("soap_jax.") and page != "changelog.md":
        raise exceptions.PluginError(f"{page} names {name}, which does not exist.")
    if isinstance(value, types.ModuleType):
        return value.__name__ if name.startswith("soap_jax.") else None
    own = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    return own if own.startswith("soap_jax.") else None


def read_notebook(path):
    """A notebook's page without outputs, to check the site alone: `NOTEBOOKS=text`."""
    cells = jupytext.read(path).cells
    code = {cell.id for cell in cells if cell.cell_type == "code"}
    parts = [f"```python\n{c.source}\n```" if c.id in code else c.source for c in cells]
    return "\n\n".join(parts) + "\n", {}


def run_notebook(path):
    """Runs a notebook; returns its page and its figures by name."""
    notebook = jupytext.read(path)
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=1200,
        startup_timeout=600,
        extra_arguments=["--log-level=40"],  # errors alone
    )
    client.execute()
    parts, figures, drawn = [], {}, 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        printed = ""
        for output in cell.outputs:
            data = output.get("data", {})
            if output.get("name") == "stderr":
                raise exceptions.PluginError(f"{path.name} warns:\n{output['text']}")
            if "image/png" in data:
                name = f"{path.stem}-{len(figures)}.png"
                figures[name] = base64.b64decode(data["image/png"])
            else:
                printed += output.get("text", data.get("text/plain", ""))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
        shown = list(figures)[drawn:]
        parts += [f"![The figure that this code draws]({name})" for name in shown]
        drawn += len(shown)
    source = f"{REPOSITORY}/blob/main/examples/notebooks/{path.name}"
    needs = ", with `pip install matplotlib`" * ("import matplotlib" in path.read_text())
    parts.insert(1, f"*This page is a notebook, run as it stands{needs}: [its text]({source}).*")
    return "\n\n".join(parts) + "\n", figures


def modules():
    """The package, and its public modules."""
    values = [getattr(soap_jax, name) for name in soap_jax.__all__]
    return soap_jax, *(value for value in values if isinstance(value, types.ModuleType))


def short_names():
    """The name by which users import what another module defines, by its full name."""
    found = {}
    for module in modules():
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                full = f"{value.__module__}.{value.__qualname__}"
                found.setdefault(full, f"{module.__name__}.{name}")
    return found


def public_names():
    """Every public name, by the module that defines it."""
    for module in (*modules(), importlib.import_module("soap_jax.feedback")):
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            own = getattr(value, "__module__", None) or module.__name__
            if name.startswith("_") or isinstance(value, types.ModuleType):
                continue
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            if own == module.__name__ or hasattr(module, "__all__"):
                yield f"{own}.{value.__qualname__}"


def on_post_build(config):
    """Fails if a public name has no entry in the API reference."""
    with open(pathlib.Path(config.site_dir, "objects.inv"), "rb") as file:
        known = set(Inventory.parse_sphinx(file))
    missing = sorted(set(public_names()) - known)
    if missing:
        raise exceptions.PluginError(f"No API entry: {', '.join(missing)}")
