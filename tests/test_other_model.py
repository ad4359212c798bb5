"""Each lesson that chooses its model, asserts included, on a model of another width, picture size, downscale factor and scaling factor, with random weights."""
import re

import pytest
from conftest import CFG, NBS, apart
from test_notebooks import run_notebook

LESSONS = [nb for nb in NBS if re.match(r'(0[1-9]|1[013-7]|2[34])_', nb.name)]     # not 12: the tokenizer is the same in every model
CHOICE = "model = 'embedded'   # or"


@pytest.mark.parametrize('nb', LESSONS, ids=lambda p: p.name)
@apart
def test_one_changed_name(nb, other, tmp_path, capfd):
    "With one changed name every cell runs, and every assert in it holds."
    source = nb.read_text()
    assert source.count(CHOICE) == 1, f'a lesson chooses its model in one line that begins: {CHOICE}'
    (tmp_path/nb.name).write_text(source.replace(CHOICE, f"model = '{other}'   # or"))
    ok, _ = run_notebook(tmp_path/nb.name, skip_flags=CFG.tst_flags.split(), force_flags=[], basepath=CFG.config_path, cell_timeout=CFG.cell_timeout)
    assert ok, capfd.readouterr().err[-3000:]
