"""One test a notebook, run by nbdev's own runner: `#| eval: false` and the flags in `tst_flags` hold (NB_FLAGS=slow runs flagged cells)."""
import os

import pytest
from conftest import CFG, NBS
from nbdev.test import test_nb as run_notebook

run_notebook.__test__ = False


@pytest.mark.parametrize('nb', NBS, ids=lambda p: p.name)
def test_notebook(nb, capfd):
    "Every cell runs and every assert in it holds."
    ok, _ = run_notebook(nb, skip_flags=CFG.tst_flags.split(), force_flags=os.environ.get('NB_FLAGS', '').split(),
                         basepath=CFG.config_path, cell_timeout=CFG.cell_timeout)
    assert ok, capfd.readouterr().err[-3000:]
