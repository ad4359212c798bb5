"""What becomes of a notebook on its way to a page: nbdev's steps, with the course's own in the place of some."""
import ast, re
from pathlib import Path
from unittest.mock import patch

from fastcore.basics import AttrDict
from fastcore.docments import DocmentText, docments
from nbdev import doclinks, processors, showdoc
from nbdev.doclinks import NbdevLookup, nbpath2html
from nbdev.process import Processor

IMPORTS, DEFS = (ast.Import, ast.ImportFrom), (ast.FunctionDef, ast.ClassDef)


class Description(showdoc.BasicMarkdownRenderer):
    "A function's description: the whole first paragraph in italics, the comment of `**kwargs` beside it, types by their names."
    def __init__(self, sym, **kw):
        self.is_property = isinstance(sym, property)       # nbdev unwraps it
        super().__init__(sym, **kw)
        if hasattr(sym, '__wrapped__'): self.nm = sym.__qualname__      # nbdev names what was wrapped, without its class
        first, *rest = (self.docs or '').split('\n\n')
        self.docs = '\n\n'.join([' '.join(first.split()), *rest])      # nbdev sets the first line in italics
        if isinstance(self.dm, DocmentText):
            self.dm.dm = {k: v for k, v in docments(self.dm.obj, full=True, args_kwargs=True).items() if k != 'self'}

    def _kind(self, signature):
        "A class is called one, with its fields or what it is derived from; a property has no brackets."
        if self.is_property: return re.sub(r'def \w+\(\)(.*):\n', rf'{self.nm}\1\n', signature)
        if not isinstance(self.sym, type): return signature
        fields = {name: getattr(t, '__name__', t) for name, t in getattr(self.sym, '__annotations__', {}).items()} if hasattr(self.sym, '_fields') else {}
        own = ', '.join([f'{name}:{t}' for name, t in fields.items()] or [base.__name__ for base in self.sym.__bases__])
        return re.sub(r'\(\s*\*args, \*\*kwargs\s*\)', f'({own})', signature.replace('def ', 'class ', 1).replace(')->None:', '):'))

    def _repr_markdown_(self):
        "Types by the names that the source has: no module before a capital letter. A heading `__call__` is not bold."
        short = lambda signature: self._kind(re.sub(r'\b(?:\w+\.)+(?=[A-Z])', '', signature[0]))
        text = re.sub(r'```python\n.*?```', short, super()._repr_markdown_(), flags=re.S)
        return re.sub(r'^#+ .*$', lambda heading: heading[0].replace('_', r'\_'), text, count=1, flags=re.M)


def index_all(index, files, root, nbs_path):
    """Put into nbdev's index what it leaves out: the functions and classes of notebooks with 'auto' in their name, the autoencoders.
    Their methods have no headings of their own."""
    cells = doclinks._iter_py_cells
    with patch.object(doclinks, '_iter_py_cells', lambda file: (AttrDict(cell | dict(nb='')) for cell in cells(file))):
        for module, names in (pair for file in files for pair in doclinks._get_modidx(file, root, nbs_path).items()):
            plain = {name: place for name, place in names.items() if '.' not in name.removeprefix(f'{module}.')}
            index['syms'].setdefault(module, plain)


class Lookup(NbdevLookup):
    """Where a word of code links to. A plain word may be a variable or a column: it is linked only where its function is known.
    What the page makes itself is linked to no other page."""
    def __init__(self, page, made, known):
        super().__init__()
        self.page, self.made, self.known = page, made, known

    def _link_sym(self, m):
        plain = m[1].isalpha() and m[1].islower() and not m[0].endswith('()`')
        its_own = m[1] in self.made and f'/{self.page}#' not in (self.doc(m[1]) or '')
        return m[0] if its_own or (plain and m[1] not in self.made | self.known) else super()._link_sym(m)


class add_links(Processor):
    "Link words of code in the text and in descriptions to their functions."
    def __init__(self, nb):
        nodes = [n for c in nb.cells if c.cell_type == 'code' for top in c.parsed_() or [] for n in ast.walk(top)]
        made = {n.name for n in nodes if isinstance(n, DEFS)}
        known = {a.asname or a.name for n in nodes if isinstance(n, IMPORTS) for a in n.names}
        self.lookup = Lookup(nbpath2html(Path(nb.path_)).name, made, known)

    def cell(self, cell):
        if cell.cell_type == 'markdown': cell.source = self.lookup.linkify(cell.source)
        for data in (o['data'] for o in cell.get('outputs', []) if 'data' in o):
            if 'text/markdown' in data: data['text/markdown'] = self.lookup.linkify(''.join(data['text/markdown']))


def show_hidden(cell):
    "What is exported without being shown is shown folded: the code below needs it."
    if cell.cell_type == 'code' and 'hide' not in cell.directives_ and {'export', 'exporti'} & cell.directives_.keys():
        cell.directives_ = {'exports': '', 'folded': ''}


def add_aside(cell):
    "A cell that is not run with the rest comes in a box that says why; exercises say it themselves."
    if cell.cell_type != 'code': return
    if 'slow' in cell.directives_: why = 'Slow'
    elif cell.directives_.get('eval') == 'false' and not re.search(r'# (exercise|check) \d', cell.source): why = 'On a GPU' if 'torch.cuda' in cell.source else 'With a network'
    else: return
    cell.source = f'#| code-fold: show\n#| code-summary: "{why}: not run with the rest"\n{cell.source}'


def add_fold(cell):
    "Exported code comes in a box that says what it is."
    if cell.cell_type != 'code' or 'exports' not in cell.directives_: return
    trees, folded = cell.parsed_() or [], 'folded' in cell.directives_
    names = [tree.name for tree in trees if isinstance(tree, DEFS)]
    imports = not names and any(isinstance(n, IMPORTS) for tree in trees for n in ast.walk(tree))
    if folded or not imports:
        values = [n.id for tree in trees if isinstance(tree, ast.Assign) for n in ast.walk(tree.targets[0]) if isinstance(n, ast.Name)]
        title = 'Imports' if imports else f'The code of {", ".join(names)}' if names else ', '.join(values) or 'Code'
        cell.source = f'#| code-fold: {"true" if folded else "show"}\n#| code-summary: "{title}"\n{cell.source}'


class docs_first(Processor):
    "What a cell defines is described before its code, in its order."
    def begin(self):
        cells = self.nb.cells
        for cell in [c for c in cells if c.cell_type == 'code' and 'exports' in c.directives_]:     # a move changes no later place
            first = end = cell.idx_ + 1
            while end < len(cells) and getattr(cells[end], 'has_sd', False): end += 1
            cells[cell.idx_:end] = [*reversed(cells[first:end]), cell]


class Steps(processors.FilterDefaults):
    "nbdev's steps with these in their places."
    def base_procs(self):
        own = {'mv_exports': [docs_first], 'add_links': [add_links], 'add_fold': [add_fold, add_aside], 'rm_export': [show_hidden, processors.rm_export]}
        return [step for old in super().base_procs() for step in own.get(old.__name__, [old])]
