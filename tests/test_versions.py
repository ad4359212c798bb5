"""The library's pipeline and the parts by hand agree, on the locked versions, on the oldest that settings.ini allows, and on the newest there are."""
import json
import os
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import version
from inspect import signature

import diffusers
import pytest
import torch
from conftest import NO_REGISTRY, ROOT, not_here
from packaging.requirements import Requirement

from sd_deepdive.scratch.samplers import SAMPLERS

LIBRARIES = ['diffusers', 'transformers']
LEVELS = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', steps_offset=1)
CHECKS = ['tests/test_versions.py::test_steps_equal', 'tests/test_by_hand.py::test_another_model_equals_the_library',
          'tests/test_by_hand.py::test_sampler_of_each_kind', 'tests/test_model.py::test_plain_diffusers_makes_the_same_pictures',
          'tests/test_model.py::test_folder_and_safety_checker', '-o', 'filterwarnings=default']      # their warnings are not ours


def follow(scheduler, **options):
    "Times and latents of a run of six steps in which the UNet says what depends on what it sees."
    scheduler.set_timesteps(6)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))*scheduler.init_noise_sigma
    went = []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(.8*seen + .3*seen.roll(1, 1), t, x, **options).prev_sample
        went.append(x)
    return scheduler.timesteps.float(), torch.stack(went)


@pytest.mark.parametrize('name', SAMPLERS)
def test_steps_equal(name):
    "Each sampler by hand takes the library's steps, at the library's times."
    ours = SAMPLERS[name](**LEVELS)
    kind = getattr(diffusers, ours.library)
    settings = ours.config | dict(clip_sample=False, skip_prk_steps=True)
    theirs = kind(**{k: settings[k] for k in signature(kind.__init__).parameters if k in settings})
    chance = lambda: dict(generator=torch.Generator().manual_seed(1)) if 'generator' in signature(kind.step).parameters else {}
    (times, mine), (wanted, library) = follow(ours, **chance()), follow(theirs, **chance())
    assert torch.allclose(times, wanted) and (mine - library).abs().max() < 1e-4*library.abs().max()
    assert (mine[-1] - mine[0]).abs().max() > .1


def pip(*args):
    "Run `pip install`. Without a registry: a failure in CI, one line elsewhere."
    res = subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--retries', '1', *args], capture_output=True,
                         text=True, timeout=600)
    if '(from versions: none)' in res.stderr: not_here(NO_REGISTRY)
    assert res.returncode == 0, res.stderr[-3000:]
    return res.stdout


def resolve(*args):
    "Name and version of each package that pip would install."
    found = json.loads(pip('--dry-run', '--report', '-', *args))['install']
    return {p['metadata']['name']: p['metadata']['version'] for p in found}


def ranges():
    "What settings.ini asks of the two libraries, by name."
    ini = ConfigParser()
    ini.read(ROOT/'settings.ini')
    wanted = map(Requirement, ini['DEFAULT']['requirements'].split())
    return {r.name: r.specifier for r in wanted if r.name in LIBRARIES}


def oldest():
    "The lower ends of the ranges."
    return {name: next(s.version for s in spec if s.operator == '>=') for name, spec in ranges().items()}


def newest():
    "The newest versions of the registry that the ranges allow."
    return resolve('--no-deps', '--ignore-installed', *(f'{name}{spec}' for name, spec in ranges().items()))


@pytest.mark.parametrize('end', [oldest, newest])
def test_ends(end, tmp_path):
    "The checks hold with these versions and what they need beside the locked ones: pipelines load and draw, and equal the parts by hand."
    wanted = end()
    assert sorted(wanted) == LIBRARIES
    if wanted == {name: version(name) for name in wanted}: return      # they are the locked ones, and all tests run on those
    needed = resolve(*(f'{name}=={number}' for name, number in wanted.items()))
    assert 'torch' not in needed
    pip('--no-deps', '--no-compile', '--target', tmp_path, *(f'{name}=={number}' for name, number in needed.items()))
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST_')} | dict(PYTHONPATH=str(tmp_path), OMP_NUM_THREADS='1')
    run = lambda *args: subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    names = ', '.join(wanted)
    imported = run('-c', f'import {names}; print(*(lib.__version__ for lib in ({names})))')
    assert imported.returncode == 0, f'{needed}\n{imported.stderr[-3000:]}'
    there = dict(zip(wanted, imported.stdout.split()))
    assert all(f'{there[name]}.0'.startswith(f'{number}.') for name, number in wanted.items()), f'{there} instead of {wanted}'
    done = run('-m', 'pytest', '-q', '-n', '0', '-p', 'no:cacheprovider', *CHECKS)
    assert done.returncode == 0, f'{needed}\n{done.stdout[-5000:]}'
