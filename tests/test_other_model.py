"""Each lesson, asserts included, on a model of another width, picture size, downscale factor and scaling factor, with random weights."""
import re

import pytest
from conftest import CFG, NBS, untrained
from test_notebooks import run_notebook

LESSONS = [nb for nb in NBS if re.match(r'(0[1-9]|1[0-7])_', nb.name)]
CHOICE = "model = 'embedded'   # or"


@pytest.fixture(scope='session')
def other(tmp_path_factory):
    "The folder of the other model: text width 32, pictures of 64 x 64, 4 x 4 pixels for one latent, scaling factor 0.3."
    folder = tmp_path_factory.mktemp('other')
    untrained(width=32, unet=(16, 32, 32), vae=(8, 16, 16), side=16, scaling_factor=.3).save_pretrained(folder)
    return folder


@pytest.mark.parametrize('nb', LESSONS, ids=lambda p: p.name)
def test_one_changed_name(nb, other, tmp_path, capfd):
    "With one changed name every cell runs, and every assert in it holds."
    source = nb.read_text()
    assert source.count(CHOICE) == 1, f'a lesson chooses its model in one line that begins: {CHOICE}'
    (tmp_path/nb.name).write_text(source.replace(CHOICE, f"model = '{other}'   # or"))
    ok, _ = run_notebook(tmp_path/nb.name, skip_flags=CFG.tst_flags.split(), force_flags=[], basepath=CFG.config_path, cell_timeout=CFG.cell_timeout)
    assert ok, capfd.readouterr().err[-3000:]
