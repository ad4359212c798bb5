"""Every exercise of every lesson: its check fails on the unsolved cell, and holds for the folded solution."""
import re

import pytest
from conftest import CFG, NBS, apart
from execnb.shell import CaptureShell
from fastcore.nbio import read_nb


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


@pytest.mark.parametrize('nb', [nb for nb in NBS if list(exercises(nb))], ids=lambda p: p.name)
@apart
def test_exercises(nb, offline):
    "Run the lesson, then each exercise as a reader would: unsolved, solved."
    shell = CaptureShell(CFG.nbs_path)
    for cell in read_nb(nb).cells:
        if cell.cell_type == 'code' and not re.search(r'^#\| *(eval: false|slow)', cell.source, re.M): shell.run(cell.source)
        assert not shell.exc, shell.exc

    def holds(*sources):
        for s in sources:
            shell.run(s)
            if shell.exc: return False
        return True

    for number, unsolved, check, solution in exercises(nb):
        assert not holds(unsolved, check), f'check {number} holds on the unsolved cell'
        assert holds(unsolved, solution, check), f'check {number} fails on the solution: {shell.exc}'
