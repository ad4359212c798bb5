"""Models by name: a stand-in for the hub on this machine, and all that can go wrong with it; single files."""
import hashlib, http.server, json, os, re, shutil, subprocess, sys, threading, time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Evil, untrained
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file, save_file

from sd_deepdive import hub, places
from sd_deepdive.images import max_difference
from sd_deepdive.models import load_pipeline, text_to_image
from sd_deepdive.sampling import make_samples
from sd_deepdive.scratch.parts import load_parts

NAME, COMMIT = 'someone/model', 'c0ffee' + '0'*34
UNET = 'unet/diffusion_pytorch_model.safetensors'
LOADERS = dict(library=lambda **kw: load_pipeline(NAME, 'cpu', **kw), by_hand=lambda **kw: load_parts(NAME, 'cpu', **kw))


def find(): return hub.find_folder(NAME, places.PARTS)      # what both loaders begin with


class Hub(http.server.ThreadingHTTPServer):
    """Speaks as much of the hub's protocol as its client needs. Large files (safetensors) lie behind a redirect to another host.
    Faults: `answers` gives a status (and headers) to whatever path it matches, `cut` ends a file after so many bytes,
    `other` replaces the content of a file but not what is announced, `pause` is one in the middle of each large file."""
    def __init__(self, folder):
        super().__init__(('127.0.0.1', 0), Answer)
        self.files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()}
        self.url, self.cdn = (f'http://{host}:{self.server_port}' for host in ('127.0.0.1', 'localhost'))
        self.well()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def well(self): self.answers, self.cut, self.other, self.pause, self.got = {}, {}, {}, 0, []

    def sums(self, name):
        "The checksum of git, and that of a large file or None."
        data = self.files[name]
        sha = hashlib.sha256(data).hexdigest() if name.endswith('.safetensors') else None
        return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest(), sha

    def listing(self, name):
        git, sha = self.sums(name)
        lfs = dict(lfs=dict(oid=sha, sha256=sha, size=len(self.files[name]), pointerSize=134)) if sha else {}
        return dict(type='file', path=name, rfilename=name, size=len(self.files[name]), oid=git, blobId=git, **lfs)


class Answer(http.server.BaseHTTPRequestHandler):
    "What the stand-in answers."
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
    def handle(self):
        try: super().handle()
        except ConnectionError: pass      # the client went away

    def send(self, status, body=b'', **headers):
        self.send_response(status)
        for key, value in {'Content-Length': len(body), **headers}.items(): self.send_header(key.replace('_', '-'), str(value))
        self.end_headers()
        if self.command == 'GET': self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, self.path.partition('?')[0]
        for pattern, (status, headers) in hub.answers.items():
            if re.search(pattern, path): return self.send(status, b'no', **headers)
        if path.startswith(f'/api/models/{NAME}'):
            held = [hub.listing(name) for name in hub.files]
            return self.send(200, json.dumps(held if '/tree/' in path else dict(id=NAME, sha=COMMIT, siblings=held)).encode(), Content_Type='application/json')
        name = re.sub(f'^/({NAME}/resolve/[^/]+|cdn)/', '', path)
        if name not in hub.files: return self.send(404, X_Error_Code='EntryNotFound' if NAME in path else 'RepoNotFound')
        git, sha = hub.sums(name)
        known = dict(ETag=f'"{sha or git}"', X_Repo_Commit=COMMIT, Accept_Ranges='bytes')
        if sha and not path.startswith('/cdn/'):
            return self.send(302, Location=f'{hub.cdn}/cdn/{name}', X_Linked_Etag=f'"{sha}"', X_Linked_Size=len(hub.files[name]), **known)
        if self.command == 'HEAD': return self.send(200, hub.files[name], **known)
        self.send_file(name, hub.other.get(name, hub.files[name]), known)
    do_HEAD = do_GET

    def send_file(self, name, data, known):
        "A file, or the rest of it if the client has the beginning."
        begin = int((re.search(r'bytes=(\d+)-', self.headers.get('Range', '')) or [0, 0])[1])
        self.server.got.append((name, begin))
        self.send_response(206 if begin else 200)
        for key, value in known.items(): self.send_header(key.replace('_', '-'), value)
        if begin: self.send_header('Content-Range', f'bytes {begin}-{len(data) - 1}/{len(data)}')
        self.send_header('Content-Length', str(len(data) - begin))
        self.end_headers()
        end = self.server.cut.get(name, len(data))
        half = (begin + end)//2
        self.wfile.write(data[begin:half])
        if name.endswith('.safetensors'): threading.Event().wait(self.server.pause)
        self.wfile.write(data[half:end])
        if name in self.server.cut: self.close_connection = True


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "What the hub holds: a very small model as the folder that was saved, in full precision and in half, and a pickle that nobody wants."
    folder = tmp_path_factory.mktemp('held')
    small = untrained().to(torch.float16)
    small.unet.conv_in.bias.data.fill_(1.)      # to tell one from the other
    small.save_pretrained(folder, variant='fp16')
    untrained().save_pretrained(folder)
    (folder/'unet'/'diffusion_pytorch_model.bin').write_bytes(b'a pickle')
    return folder


@pytest.fixture
def stand_in(folder, tmp_path, monkeypatch):
    "The hub, with a cache of its own; nobody waits between tries."
    server = Hub(folder)
    for key, value in dict(ENDPOINT=server.url, HUGGINGFACE_CO_URL_TEMPLATE=server.url + '/{repo_id}/resolve/{revision}/{filename}',
                           HF_HUB_CACHE=str(tmp_path/'home'/'hub'), HF_HUB_OFFLINE=False).items(): monkeypatch.setattr(constants, key, value)
    for key in ('NO_PROXY', 'no_proxy'): monkeypatch.setenv(key, '127.0.0.1,localhost')
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    close_session()
    yield server
    server.shutdown(), server.server_close(), close_session()


def pixels(model):
    "A picture of a loaded model, as numbers."
    from sd_deepdive.parts import take_apart
    return make_samples(take_apart(model), 'a bell', seeds=1, num_inference_steps=3)


def left_behind(cache):
    "Files of the cache that are half-written, or not what their name says."
    files = [f for f in Path(cache).rglob('*') if f.is_file() and not f.is_symlink()] if Path(cache).is_dir() else []
    return [f for f in files if f.suffix == '.incomplete' or f.parent.name == 'blobs' and hub.checksum(f, git=len(f.name) == 40) != f.name]


def refused(call, kind, words):
    "That `call` ends in one line of ours, of this kind and with these words."
    with pytest.raises(kind, match=words) as e: call()
    assert type(e.value) is kind and e.value.__cause__ is None and len(str(e.value).splitlines()) == 1
    assert NAME in str(e.value) and 'http' not in str(e.value).replace(f'{constants.ENDPOINT}/{NAME}', '') and 'Error:' not in str(e.value)


@pytest.mark.parametrize('load', LOADERS.values(), ids=LOADERS)
def test_fetched(stand_in, folder, load, monkeypatch):
    "A model from the hub draws what its folder draws; half precision is fetched where it is wanted; no pickle ever; nothing twice; then offline."
    from sd_deepdive.parts import load_parts as from_folder
    expected = pixels(from_folder(folder, 'cpu'))
    assert (pixels(load()) - expected).abs().max() < 1e-5
    names = [name for name, _ in stand_in.got]
    assert len(names) == len(set(names)) and UNET in names and not any('fp16' in n or n.endswith('.bin') for n in names)
    stand_in.got.clear()
    load()
    assert stand_in.got == []
    half = load(dtype=torch.float16)
    assert {name for name, _ in stand_in.got} == {n for n in stand_in.files if 'fp16' in n} and half.unet.dtype == torch.float16
    stand_in.shutdown(), stand_in.server_close()
    assert (pixels(load()) - expected).abs().max() < 1e-5
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert find() == hub.find_folder(NAME, places.PARTS, half=True)


def test_half_precision_weights(folder):
    "Weights saved in half precision are taken where it computes in half precision, and only there."
    full, half = (load_pipeline(folder, 'cpu', dtype).unet.conv_in.bias for dtype in (torch.float32, torch.float16))
    assert (half == 1).all() and not (full == 1).any()


FAULTS = {       # what the hub does: (kind of error, words)
    'no such model': (dict(answers={'.': (404, dict(X_Error_Code='RepoNotFound'))}), ValueError, 'no such model.*Check the name'),
    'private': (dict(answers={'.': (401, dict(X_Error_Code='RepoNotFound'))}), PermissionError, 'private.*HF_TOKEN'),
    'gated, no token': (dict(answers={'.': (401, dict(X_Error_Code='GatedRepo'))}), PermissionError, 'licence.*HF_TOKEN'),
    'gated': (dict(answers={'.': (403, dict(X_Error_Code='GatedRepo'))}), PermissionError, 'licence.*HF_TOKEN'),
    'gated files': (dict(answers={'resolve': (403, dict(X_Error_Code='GatedRepo'))}), PermissionError, 'licence.*HF_TOKEN'),
    'forbidden': (dict(answers={'.': (403, {})}), PermissionError, 'HF_TOKEN'),
    'too many requests': (dict(answers={'.': (429, {})}), ConnectionError, 'too many requests.*Wait'),
    'too many files': (dict(answers={'resolve': (429, {})}), ConnectionError, 'too many requests.*Wait'),
    'out of order': (dict(answers={'.': (500, {})}), ConnectionError, 'out of order.*later'),
    'files out of order': (dict(answers={'cdn/unet': (503, {})}), ConnectionError, 'out of order.*later'),
    'not JSON': (dict(answers={'api': (200, {})}), ConnectionError, 'Check the name and the network'),
    'cut': (dict(cut={UNET: 5000}), ConnectionError, 'network.*call again'),
    'another size': (dict(other={UNET: b'x'*100}), OSError, 'damaged.*Call again'),
    'a wrong byte': (dict(other={UNET: lambda data: data[:-1] + bytes([data[-1] ^ 1])}), OSError, 'damaged.*Call again'),
    'a wrong config': (dict(other={'unet/config.json': lambda data: data.replace(b'4', b'8')}), OSError, 'damaged.*Call again')}


@pytest.mark.parametrize('load', LOADERS.values(), ids=LOADERS)
def test_loaders_say_the_same(stand_in, load):
    "What is told of a model that cannot be had comes through both loaders as it is."
    stand_in.answers = {'.': (403, dict(X_Error_Code='GatedRepo'))}
    refused(load, PermissionError, f'licence on {stand_in.url}/{NAME} .*HF_TOKEN')


@pytest.mark.parametrize('fault', FAULTS)
def test_faults(stand_in, folder, fault):
    "Each fault ends in one clear line and leaves nothing half-written; when the hub is well again, the next call succeeds and fetches only what is missing."
    how, kind, words = FAULTS[fault]
    for key, value in how.items(): setattr(stand_in, key, {k: v(stand_in.files[k]) if callable(v) else v for k, v in value.items()})
    refused(find, kind, words)
    assert left_behind(constants.HF_HUB_CACHE) == []
    whole = {f.name for f in Path(constants.HF_HUB_CACHE).rglob('blobs/*')}
    stand_in.well()
    find()
    again = {stand_in.sums(name)[1] or stand_in.sums(name)[0] for name, _ in stand_in.got}
    assert not again & whole and left_behind(constants.HF_HUB_CACHE) == []
    if 'cdn' in str(how) or 'cut' in how: assert whole       # what came before is kept


def test_resumed(stand_in, folder):
    "A connection that breaks once in the middle of a file: it is fetched again, and is right."
    once, send_file = [], Answer.send_file
    def breaks_once(self, name, data, known):
        if name == UNET:
            self.server.cut = {} if once else {UNET: 5000}
            once.append(name)
        send_file(self, name, data, known)
    Answer.send_file = breaks_once
    try: find()
    finally: Answer.send_file = send_file
    assert len(once) == 2 and left_behind(constants.HF_HUB_CACHE) == []


def test_killed_in_the_middle(stand_in, tmp_path):
    "A process that is killed while it fetches leaves nothing that the next one takes for whole."
    stand_in.pause = 8
    process = fetcher(stand_in, tmp_path)
    while UNET not in {name for name, _ in stand_in.got} and process.poll() is None: threading.Event().wait(.02)
    threading.Event().wait(.5)       # now half of it is on its way
    assert process.poll() is None, process.communicate()
    process.kill(), process.communicate()
    begun = [*Path(constants.HF_HUB_CACHE).rglob('*.incomplete')]
    assert begun
    stand_in.well()
    find()
    assert UNET in {name for name, _ in stand_in.got} and set(left_behind(constants.HF_HUB_CACHE)) <= set(begun)


def fetcher(server, folder, before=''):
    "A fresh Python that finds hub and cache by the variables that everyone uses, fetches, and prints the error if there is one."
    code = f'''
{before}
from sd_deepdive.hub import find_folder
try: find_folder({NAME!r}, {places.PARTS}); print('well')
except Exception as e: print(f'{{type(e).__name__}}: {{e}}')
'''
    env = os.environ | dict(HF_ENDPOINT=server.url, HF_HOME=str(folder/'home'), HF_HUB_OFFLINE='0', NO_PROXY='127.0.0.1,localhost')
    return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes(stand_in, tmp_path):
    "Two that fetch one model at once both get it, and each file is sent once."
    stand_in.pause = .3
    both = [fetcher(stand_in, tmp_path) for _ in range(2)]
    assert [process.communicate(timeout=100)[0].splitlines()[-1:] for process in both] == [['well']]*2
    sent = [name for name, _ in stand_in.got]
    assert UNET in sent and len(set(sent)) == len(sent) and left_behind(tmp_path/'home') == []


def test_disk_full(stand_in, tmp_path):
    "Where a file cannot grow, as on a full disk, one line says so; with room the next call succeeds."
    limit = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))'
    said = fetcher(stand_in, tmp_path, before=limit).communicate(timeout=100)[0].splitlines()[-1]
    assert re.match("OSError: name='someone/model' .*is full.*HF_HOME", said) and left_behind(tmp_path/'home') == []
    find()


def test_no_room(stand_in, monkeypatch):
    "If the disk has no room for what is missing, nothing is fetched."
    with monkeypatch.context() as m:
        m.setattr(shutil, 'disk_usage', lambda place: shutil._ntuple_diskusage(100, 99, 1))
        refused(find, OSError, 'needs 0.0 GB.*HF_HOME')
    assert stand_in.got == []
    find()


def test_cache_that_cannot_be_written(stand_in, tmp_path, monkeypatch):
    "A file in the place of the cache's folder."
    (tmp_path/'file').write_text('')
    with monkeypatch.context() as m:
        m.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'file'/'cache'))
        refused(find, OSError, 'cannot be written.*HF_HOME')
    find()


def test_damaged_later(stand_in, folder):
    "What changed in the cache after it was checked is checked again, and fetched anew if it is damaged."
    find()
    file, = (f for f in Path(constants.HF_HUB_CACHE).rglob(UNET.split('/')[1]) if f.parent.name == 'unet')
    blob = file.resolve()
    blob.write_bytes(blob.read_bytes()[:-9])
    refused(find, OSError, 'damaged.*Call again')
    find()


def test_half_a_model(stand_in, folder):
    "What came before the hub failed is not taken for a model while the hub is out of order."
    stand_in.answers = {'resolve/.*tokenizer.json': (404, {})}
    refused(find, ValueError, 'no such')
    stand_in.answers = {'.': (500, {})}
    refused(find, ConnectionError, 'out of order')


def test_only_half_there(stand_in):
    "Where all weights are in half precision, they are taken for full precision too."
    stand_in.files = {name: data for name, data in stand_in.files.items() if 'fp16' in name or not name.endswith('.safetensors')}
    for load in LOADERS.values(): assert load().unet.dtype == torch.float32


def test_no_pipeline(stand_in):
    "A repository of something else, and one with pickles alone, are refused before anything is fetched."
    whole = dict(stand_in.files)
    del stand_in.files['model_index.json']
    refused(find, ValueError, 'no pipeline')
    stand_in.files = {name: data for name, data in whole.items() if not (name.startswith('unet') and 'safetensors' in name)}
    refused(find, ValueError, 'unet.*pickle')
    assert stand_in.got == []


# Single files ----------------------------------------------------------------------------------------------------------

def old_layout(folder):
    "The weights of a pipeline under the names that Stable Diffusion's first authors gave them."
    from sd_deepdive.scratch.checkpoints import name_today
    read = lambda part: {name_today(k): v for k, v in load_file(next((folder/part).glob('*model.safetensors'))).items()}
    unet, vae, text = map(read, ('unet', 'vae', 'text_encoder'))
    levels, layers = len(places.SD1['unet']['block_out_channels']), places.SD1['unet']['layers_per_block']
    blocks, n, m = {'conv_in': 'input_blocks.0.0', 'time_embedding.linear_1': 'time_embed.0', 'time_embedding.linear_2': 'time_embed.2',
                    'conv_norm_out': 'out.0', 'conv_out': 'out.2', 'mid_block.resnets.0': 'middle_block.0', 'mid_block.attentions.0': 'middle_block.1',
                    'mid_block.resnets.1': 'middle_block.2'}, 0, -1
    for i in range(levels):
        for j in range(layers):
            n += 1
            blocks |= {f'down_blocks.{i}.resnets.{j}': f'input_blocks.{n}.0', f'down_blocks.{i}.attentions.{j}': f'input_blocks.{n}.1'}
        if i < levels - 1: n += 1; blocks[f'down_blocks.{i}.downsamplers.0.conv'] = f'input_blocks.{n}.0.op'
        for j in range(layers + 1):
            m += 1
            blocks |= {f'up_blocks.{i}.resnets.{j}': f'output_blocks.{m}.0', f'up_blocks.{i}.attentions.{j}': f'output_blocks.{m}.1'}
        blocks[f'up_blocks.{i}.upsamplers.0.conv'] = f'output_blocks.{m}.{1 if i == 0 else 2}.conv'
    inside = {'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'norm2': 'out_layers.0', 'conv2': 'out_layers.3', 'time_emb_proj': 'emb_layers.1',
              'conv_shortcut': 'skip_connection'}
    old = {}
    for key, value in unet.items():
        block = next(b for b in sorted(blocks, key=len, reverse=True) if key.startswith(b + '.'))
        rest = key[len(block):]
        if '.resnets.' in block: rest = re.sub(r'^\.(\w+)', lambda hit: '.' + inside[hit[1]], rest)
        old[f'model.diffusion_model.{blocks[block]}{rest}'] = value
    for key, value in vae.items():
        key = re.sub(r'down_blocks\.(\d+)\.resnets', r'down.\1.block', key).replace('conv_shortcut', 'nin_shortcut')
        key = re.sub(r'down_blocks\.(\d+)\.downsamplers\.0', r'down.\1.downsample', key)
        key = re.sub(r'up_blocks\.(\d+)\.resnets', lambda hit: f'up.{levels - 1 - int(hit[1])}.block', key)
        key = re.sub(r'up_blocks\.(\d+)\.upsamplers\.0', lambda hit: f'up.{levels - 1 - int(hit[1])}.upsample', key)
        key = re.sub(r'mid_block\.resnets\.(\d)', lambda hit: f'mid.block_{int(hit[1]) + 1}', key).replace('conv_norm_out', 'norm_out')
        if 'attentions' in key:
            key = key.replace('mid_block.attentions.0', 'mid.attn_1').replace('group_norm', 'norm').replace('to_out.0', 'proj_out')
            key = re.sub(r'to_([qkv])\b', r'\1', key)
            if value.ndim == 2: value = value[:, :, None, None]
        old[f'first_stage_model.{key}'] = value
    old |= {f'cond_stage_model.transformer.text_model.{key}': value for key, value in text.items()}
    return {key: value.contiguous() for key, value in old.items()}


@pytest.fixture(scope='module')
def single(tmp_path_factory):
    "The embedded model as a single file, and its shapes in the place of Stable Diffusion's."
    embedded, file = places.embedded_folder(), tmp_path_factory.mktemp('single')/'model.safetensors'
    with pytest.MonkeyPatch.context() as m:
        for part in places.SD1: m.setitem(places.SD1, part, json.loads((embedded/part/'config.json').read_text()))
        save_file(old_layout(embedded), file)
        yield file


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_single_file(single, offline, dtype):
    "A single file draws what the folder draws, with no network; its pipeline saves as a folder."
    theirs, ours = load_pipeline(single, 'cpu', dtype), load_pipeline(device='cpu', dtype=dtype)
    assert theirs.safety_checker is None and theirs.unet.dtype == dtype
    for part in ('unet', 'vae', 'text_encoder'):
        mine, other = (dict(getattr(p, part).named_parameters()) for p in (theirs, ours))
        assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
    if dtype == torch.float32:
        a, b = (text_to_image(p, 'a bell', seeds=1, num_inference_steps=3)[0] for p in (theirs, ours))
        assert max_difference(a, b) == 0


def test_wrong_files(single, tmp_path):
    "Cut short, another model, a part alone, by hand, missing, a pickle: each is told, and the pickle is not opened."
    weights = load_file(single)
    cut, other, part, alone, gone = (tmp_path/f'{name}.safetensors' for name in ('cut', 'other', 'part', 'alone', 'gone'))
    cut.write_bytes(single.read_bytes()[:-50])
    first = 'model.diffusion_model.input_blocks.0.0.weight'
    save_file(weights | {first: torch.zeros(48, 9, 3, 3)}, other)
    save_file({k: v for k, v in weights.items() if k.startswith('first_stage_model')}, part)
    save_file({k: v for k, v in weights.items() if k.startswith('model.diffusion_model')}, alone)
    for file, words in {cut: 'cut short', other: 'another model', part: 'part alone', alone: 'part alone', gone: 'no such file'}.items():
        with pytest.raises(ValueError, match=f'{file.name}.*{words}'): load_pipeline(file, 'cpu')
    with pytest.raises(ValueError, match='is a file.*save_pretrained'): load_parts(single, 'cpu')


@pytest.mark.parametrize('load', [load_pipeline, load_parts])
def test_pickles(tmp_path, load):
    "Pickles that would leave a trace are refused with reason and remedy, and leave none; so is a folder that has weights of that kind alone."
    trace = tmp_path/'trace'
    for suffix in places.PICKLE_SUFFIXES:
        torch.save(Evil(trace), tmp_path/f'model{suffix}')
        with pytest.raises(ValueError, match=f'model{suffix}.*run any code.*safetensors'): load(tmp_path/f'model{suffix}')
    untrained().save_pretrained(tmp_path/'folder')
    weights = next((tmp_path/'folder'/'unet').glob('*.safetensors'))
    (tmp_path/'model.bin').rename(weights.with_suffix('.bin')), weights.unlink()
    with pytest.raises(ValueError, match='unet.*run any code.*safetensors'): load(tmp_path/'folder', 'cpu')
    assert not trace.exists()
