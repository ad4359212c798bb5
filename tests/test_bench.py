"""The benchmark for a GPU, in small: without one it still runs what can be run, and says what it leaves out."""
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

FILE = ROOT/'bench'/'on_a_gpu.py'


@pytest.fixture(scope='module')
def bench():
    spec = importlib.util.spec_from_file_location('on_a_gpu', FILE)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def small(record, *args, **env):
    "What the script says of a run in small."
    run = [sys.executable, FILE, '--small', '--record', record, *args]
    return subprocess.run(run, env=os.environ | dict(CUDA_VISIBLE_DEVICES='') | env, cwd=record.parent, capture_output=True, text=True, timeout=300)


def test_small(tmp_path):
    "Each arm that needs no GPU is measured and agrees with the reference; the rest is left out with a word."
    done = small(tmp_path/'a.json')
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path/'a.json').read_text())
    arms, compiled = record['arms'], ('ours, compiled', 'diffusers, compiled')
    assert set(arms) == {'ours', 'ours, channels last', 'ours, channels last, lean', 'diffusers', 'diffusers, channels last', *compiled}
    for name, batches in arms.items():
        assert set(batches) == ({'1'} if name in compiled else {'1', '2'})
        for r in batches.values(): assert r['error'] < 1e-4 and r['finite'] and r['steps_per_second'] > 0 and r['share'] > 0
    assert set(record['left_out']) == {'ours, CUDA graph', 'ours, compiled, CUDA graph'} and 'left out: ours, CUDA graph: CUDA graphs need a GPU' in done.stdout
    assert set(record['decode']) == {'ours', 'ours, channels last', 'diffusers'} and set(record['jobs']) == {'1', '2'}
    assert len(record['goals']) == 4 and record['torch'] == torch.__version__ and not list(tmp_path.glob('*.part'))
    one, two = record['tflop']['step'].values()
    assert abs(two/one - 2) < .01


def test_without_the_library(tmp_path):
    "Where neither diffusers nor what only notebooks need is installed, ours is measured. `--only` keeps the rest of a record."
    missing = ['diffusers', 'transformers', 'accelerate', 'IPython', 'matplotlib', 'ipywidgets', 'regex', 'huggingface_hub']
    (tmp_path/'sitecustomize.py').write_text(f'import sys\nfor name in {missing}: sys.modules[name] = None\n')
    done = small(tmp_path/'a.json', '--only', 'ours', 'diffusers', PYTHONPATH=str(tmp_path))
    record = json.loads((tmp_path/'a.json').read_text())
    assert done.returncode == 0 and record['left_out']['diffusers'] == 'diffusers is not installed', done.stdout + done.stderr
    assert set(record['arms']) == {'ours', 'ours, channels last', 'ours, channels last, lean'}
    done = small(tmp_path/'a.json', '--only', 'diffusers', '--seconds', '1')
    after = json.loads((tmp_path/'a.json').read_text())
    assert after['arms'] == record['arms'] and 'no time' in after['left_out']['diffusers'] and 'no time' in done.stdout


def test_needs_a_gpu(tmp_path):
    "Without one, the full shape is not begun."
    done = subprocess.run([sys.executable, FILE], env=os.environ | dict(CUDA_VISIBLE_DEVICES=''), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == 'There is no GPU here. Use --small to try the script without one.\n'


def test_measured_again(bench):
    "An arm that fails now has no figures of before, and one that does not is not left out."
    record = dict(left_out={'ours, batch 1': 'failed'}, arms={'ours, CUDA graph': {'1': {}, '8': {}}})
    bench.merge(record, dict(path=['arms', 'ours', '1'], value=dict(error=0.)))
    bench.merge(record, dict(path=['left_out', 'ours, CUDA graph, batch 8'], value='failed'))
    bench.merge(record, dict(path=['copy_tb_s'], value=1.))
    assert record == dict(left_out={'ours, CUDA graph, batch 8': 'failed'}, arms={'ours': {'1': dict(error=0.)}, 'ours, CUDA graph': {'1': {}}}, copy_tb_s=1.)


def test_a_job_that_hangs_or_fails(bench, tmp_path, monkeypatch):
    "One that takes too long is stopped, one that fails is named; what was found until then is kept."
    script = tmp_path/'job.py'
    script.write_text('''import json, sys, time
from pathlib import Path
way, folder = sys.argv[2], Path(sys.argv[sys.argv.index('--folder') + 1])
with (folder/'findings.jsonl').open('a') as f: f.write(json.dumps(dict(path=['arms', way], value=1)) + chr(10))
if way == 'hangs': time.sleep(100)
raise RuntimeError('no kernel')
''')
    monkeypatch.setattr(bench, '__file__', str(script))
    found, args = [], SimpleNamespace(steps=1, times=1, small=False)
    assert bench.run_job('hangs', args, tmp_path, 3, found.append) == 'stopped after 3 s'
    assert bench.run_job('fails', args, tmp_path, 30, found.append) == 'ended with 1: RuntimeError: no kernel'
    assert [f['path'] for f in found] == [['arms', 'hangs'], ['arms', 'fails']]


def test_full_shape(bench):
    "The configs are those of Stable Diffusion 1.x, and one guided step is 1.6 TFLOP."
    from sd_deepdive.scratch.autoencoder import Autoencoder
    from sd_deepdive.scratch.checkpoints import unfilled
    from sd_deepdive.scratch.text_encoder import TextEncoder
    from sd_deepdive.scratch.unet import UNet
    with unfilled(): networks = [kind(bench.FULL[name]) for name, kind in dict(unet=UNet, vae=Autoencoder, text_encoder=TextEncoder).items()]
    assert [sum(p.numel() for p in n.parameters()) for n in networks] == [859_520_964, 83_653_863, 123_060_480]
    with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False) as flops:
        networks[0](torch.empty(2, 4, 64, 64), torch.tensor(5.), networks[0].read(torch.empty(2, 77, 768)))
    assert abs(flops.get_total_flops()/1e12 - 1.6065) < .001


def test_goals(bench):
    "The fastest arm of ours beside the library as it is and compiled, and the share at the largest batch."
    rate = lambda n: dict(steps_per_second=n)
    record = dict(batches=[1, 8], matmul_tflops=dict(float16=700.), tflop=dict(step={'1': 1.6, '8': 12.8}), arms={
        'ours': {'1': rate(40.), '8': rate(20.)}, 'ours, tuned, CUDA graph': {'1': rate(120.)}, 'diffusers': {'1': rate(50.)}, 'diffusers, compiled': {'1': rate(100.)}})
    found = bench.goals(record)
    assert {k: (round(r['value'], 3), r['reached']) for k, r in found.items()} == {
        'steps a second at batch 1': (120, True), 'times diffusers, eager': (2.4, True), 'times diffusers, compiled': (1.2, True),
        'share of the matmul rate at batch 8': (.366, False)}
    assert found['steps a second at batch 1']['by'] == 'ours, tuned, CUDA graph'
    assert bench.goals(dict(batches=[1, 8])) == {}
