"""What becomes of a notebook on its way to a page: nbdev's steps, with the course's own in the place of some."""
import ast, re

from fastcore.docments import DocmentText, docments
from nbdev import processors, showdoc
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor

IMPORTS, DEFS = (ast.Import, ast.ImportFrom), (ast.FunctionDef, ast.ClassDef)


class Description(showdoc.BasicMarkdownRenderer):
    "A function's description: the whole first paragraph in italics, and the comment of `**kwargs` beside it."
    def __init__(self, sym, **kw):
        super().__init__(sym, **kw)
        first, *rest = (self.docs or '').split('\n\n')
        self.docs = '\n\n'.join([' '.join(first.split()), *rest])      # nbdev sets the first line in italics
        if isinstance(self.dm, DocmentText):
            self.dm.dm = {k: v for k, v in docments(self.dm.obj, full=True, args_kwargs=True).items() if k != 'self'}


class Lookup(NbdevLookup):
    "Where a word of code links to. A plain word may be a variable or a column: it is linked only where its function is known."
    def __init__(self, known):
        super().__init__()
        self.known = known

    def doc(self, sym):
        "The address; a heading's anchor has no underscores around a name such as `__call__`."
        return re.sub(r'(#.*\.)__(\w+?)__$', r'\1\2', super().doc(sym) or '') or None

    def _link_sym(self, m):
        plain = m[1].isalpha() and m[1].islower() and not m[0].endswith('()`')
        return m[0] if plain and m[1] not in self.known else super()._link_sym(m)


class add_links(Processor):
    "Link words of code in the text and in descriptions to their functions."
    def __init__(self, nb):
        nodes = [n for c in nb.cells if c.cell_type == 'code' for top in c.parsed_() or [] for n in ast.walk(top)]
        made = {n.name for n in nodes if isinstance(n, DEFS)}
        self.lookup = Lookup(made | {a.asname or a.name for n in nodes if isinstance(n, IMPORTS) for a in n.names})

    def cell(self, cell):
        if cell.cell_type == 'markdown': cell.source = self.lookup.linkify(cell.source)
        for data in (o['data'] for o in cell.get('outputs', []) if 'data' in o):
            if 'text/markdown' in data: data['text/markdown'] = self.lookup.linkify(''.join(data['text/markdown']))


def show_hidden(cell):
    "What is exported without being shown is shown folded: the code below needs it."
    if cell.cell_type == 'code' and 'hide' not in cell.directives_ and {'export', 'exporti'} & cell.directives_.keys():
        cell.directives_ = {'exports': '', 'folded': ''}


def add_fold(cell):
    "Exported code comes in a box that says what it is."
    if cell.cell_type != 'code' or 'exports' not in cell.directives_: return
    trees, folded = cell.parsed_() or [], 'folded' in cell.directives_
    names = [tree.name for tree in trees if isinstance(tree, DEFS)]
    imports = not names and any(isinstance(n, IMPORTS) for tree in trees for n in ast.walk(tree))
    if folded or not imports:
        title = 'Imports' if imports else f'The code of {", ".join(names)}' if names else 'Values'
        cell.source = f'#| code-fold: {"true" if folded else "show"}\n#| code-summary: "{title}"\n{cell.source}'


class Steps(processors.FilterDefaults):
    "nbdev's steps with these in their places."
    def base_procs(self):
        own = {'add_links': [add_links], 'add_fold': [add_fold], 'rm_export': [show_hidden, processors.rm_export]}
        return [step for old in super().base_procs() for step in own.get(old.__name__, [old])]
