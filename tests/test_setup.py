"""Set-up says in one line what is missing."""
import os, subprocess, sys

import pytest
from conftest import ROOT


@pytest.fixture
def setup_env(monkeypatch):
    "The set-up script as a module."
    monkeypatch.syspath_prepend(ROOT/'tools')
    import setup_env
    return setup_env


def one_line(setup_env, err):
    "The line that set-up ends on when a command has failed with `err`."
    with pytest.raises(SystemExit) as e: setup_env.explain(err)
    assert e.value.code.startswith('set-up: ') and '\n' not in e.value.code
    return e.value.code


@pytest.mark.parametrize('err, words', [
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", 'disk is full'),
    ("WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)': /simple/torch/\n"
     "ERROR: No matching distribution found for torch==2.13.0", 'needs a network'),
    ("WARNING: Retrying (Retry(total=4)) after connection broken by 'ReadTimeoutError(...)': /simple/torch/\n"
     "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", 'disk is full'),
    ("ERROR: No matching distribution found for torch==2.13.0", 'no torch==2.13.0'),
    ("The virtual environment was not created successfully because ensurepip is not\navailable.", 'python3-venv')])
def test_causes(setup_env, err, words):
    "Each known cause becomes one line that names it."
    assert words in one_line(setup_env, err)


def test_unknown_cause(setup_env):
    "An error it does not know is shown."
    with pytest.raises(SystemExit, match='something else'): setup_env.explain('something else')


def test_old_python(tmp_path):
    "A Python too old is named, with the one that is needed."
    (tmp_path/'settings.ini').write_text((ROOT/'settings.ini').read_text().replace('min_python = 3.', 'min_python = 99.'))
    res = subprocess.run([sys.executable, ROOT/'tools/setup_env.py', 'env'], cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode and res.stderr.count('\n') == 1 and 'Python 99.11 or newer is needed' in res.stderr


def test_nothing_to_be_had(tmp_path):
    "With no index to ask, set-up ends on one line."
    for f in ('settings.ini', 'setup.py', 'pyproject.toml', 'lock.txt'): (tmp_path/f).write_text((ROOT/f).read_text())
    env = {k: v for k, v in os.environ.items() if not k.startswith('PIP_')} | {'PIP_NO_INDEX': '1'}
    res = subprocess.run([sys.executable, ROOT/'tools/setup_env.py', 'env'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert res.returncode and res.stderr.count('\n') == 1 and 'pip finds no' in res.stderr
