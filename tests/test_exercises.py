"""Every exercise of every lesson: its check fails on the unsolved cell, and holds for the folded solution."""
import re
import traceback

import pytest
from conftest import CFG, NBS, apart
from execnb.shell import CaptureShell
from fastcore.nbio import read_nb
from nbdev.test import nb_test_cells
from test_notebooks import FLAGS, TIMEOUT


def exercises(nb):
    "(number, unsolved cell, check, solution) of each exercise of a lesson."
    cells = read_nb(nb).cells
    code = [c.source for c in cells if c.cell_type == 'code']
    for check in code:
        if m := re.search(r'^# check (\d+)$', check, re.M):
            unsolved = next(c for c in code if f'# exercise {m[1]}' in c)
            prose = '\n'.join(c.source for c in cells if c.cell_type == 'markdown')
            solutions = re.findall(r'<summary>Solution</summary>.*?```python\n(.*?)```', prose, re.S)
            yield m[1], unsolved, check, solutions[int(m[1]) - 1]


def said(shell):
    "The error that a shell ended with: kind, words, and the lines of the cell and of the package that it came through."
    return ''.join(traceback.format_exception(shell.exc))[-3000:]


@pytest.mark.parametrize('nb', [nb for nb in NBS if list(exercises(nb))], ids=lambda p: p.name)
@apart
def test_exercises(nb, offline, monkeypatch):
    "Run the cells of the lesson that nbdev would, then each exercise as a reader would: unsolved, solved."
    monkeypatch.chdir(nb.parent)
    monkeypatch.syspath_prepend(CFG.config_path)
    monkeypatch.setenv('IN_TEST', '1')
    shell = CaptureShell(nb)

    def holds(*sources):
        for s in sources:
            shell.run(s, timeout=TIMEOUT)
            if shell.exc: return False
        return True

    for cell in nb_test_cells(nb, CFG.tst_flags.split(), FLAGS): assert holds(cell.source), f'cell {cell.id}: {said(shell)}\n\n{cell.source}'

    for number, unsolved, check, solution in exercises(nb):
        assert not holds(unsolved, check), f'check {number} holds on the unsolved cell'
        assert holds(unsolved, solution, check), f'check {number} fails on the solution: {said(shell)}'
