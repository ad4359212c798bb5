"""What the tests share: nbdev's configuration, the notebooks, the built site and a browser."""
import faulthandler, functools, http.server, json, multiprocessing, os, runpy, shutil, socket, subprocess, sys, threading, traceback
from pathlib import Path

# Before torch is imported, for the processes that `apart` forks: one hangs that wants several threads where its parent has used several,
# and one cannot use a GPU that its parent has asked about. So there is one thread and no GPU, unless these variables say otherwise.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')

import pytest
import torch
from filelock import FileLock
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CFG = get_config(Path(__file__).parent)
ROOT = CFG.config_path
NBS = sorted(nbglob(CFG.nbs_path, as_path=True))

NO_CHROMIUM = ('Chromium or its driver was not found, so the browser tests did not run: install both (Debian: apt install chromium chromium-driver); '
               'the variable CHROME names a browser elsewhere')
NO_REGISTRY = 'No package registry was reached, so the oldest and the newest diffusers and transformers were not tried'


def not_here(why):
    "What a test needs is missing: a failure in CI, one line elsewhere."
    (pytest.fail if os.environ.get('CI') else pytest.skip)(why)


def untrained(width=16, unet=(8, 16), vae=(8, 8), side=8, **more):
    "A pipeline of Stable Diffusion's shape with random weights: text width, channels of UNet and autoencoder, latents along a side."
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from sd_deepdive.places import embedded_folder
    torch.manual_seed(0)
    n, scaling = len(unet) - 1, more.pop('scaling_factor', .18215)
    words = CLIPTextConfig(hidden_size=width, intermediate_size=2*width, num_hidden_layers=2, num_attention_heads=2, projection_dim=width,
                           bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=vae, down_block_types=['DownEncoderBlock2D']*len(vae), up_block_types=['UpDecoderBlock2D']*len(vae),
                          norm_num_groups=4, sample_size=side*2**(len(vae) - 1), scaling_factor=scaling),
        unet=UNet2DConditionModel(sample_size=side, block_out_channels=unet, cross_attention_dim=width, norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
                                  down_block_types=['CrossAttnDownBlock2D']*n + ['DownBlock2D'], up_block_types=['UpBlock2D'] + ['CrossAttnUpBlock2D']*n),
        text_encoder=CLIPTextModel(words), tokenizer=CLIPTokenizer.from_pretrained(embedded_folder()/'tokenizer'),
        scheduler=PNDMScheduler.from_pretrained(embedded_folder()/'scheduler'), requires_safety_checker='safety_checker' in more,
        **dict(safety_checker=None, feature_extractor=None) | more)


@pytest.fixture(scope='session')
def other(tmp_path_factory):
    "The folder of the other model: text width 32, pictures of 64 x 64, 4 x 4 pixels for one latent, scaling factor 0.3."
    folder = tmp_path_factory.mktemp('other')
    untrained(width=32, unet=(16, 32, 32), vae=(8, 16, 16), side=16, scaling_factor=.3).save_pretrained(folder)
    return folder


def apart(test):
    "The test in a process forked from this one, so that what a notebook leaves in memory goes with it."
    @functools.wraps(test)
    def forked(*args, **kw):
        import sd_deepdive.models  # noqa: F401  with the heavy libraries, so that no child has to load them
        end, start = os.pipe()
        if not (pid := os.fork()):
            said = 'it has not ended'
            try:
                faulthandler.dump_traceback_later(7200 if os.environ.get('NB_FLAGS') else 1200, exit=True)     # whatever holds it up, the tests go on
                try:
                    test(*args, **kw)
                    said = ''
                except BaseException: said = traceback.format_exc()[-9000:]
                os.write(start, said.encode(errors='replace'))
                sys.stdout.flush(), sys.stderr.flush()
            finally: os._exit(1 if said else 0)
        os.close(start)
        with os.fdopen(end) as f: said = f.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == 0, said or f'the process of the notebook ended with {status}'
    return forked


class Evil:
    "Leaves a trace when it is unpickled."
    def __init__(self, trace): self.trace = trace
    def __reduce__(self): return Path.touch, (self.trace,)


def launch(n):
    "The command that begins n processes on this machine, at a port that nobody listens at."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    return [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', str(n), '--num_machines', '1', '--mixed_precision', 'no',
            '--dynamo_backend', 'no', '--main_process_port', port]


def run(*args, **kw):
    "What a command prints; if it fails, the end of what it says is shown."
    res = subprocess.run(args, capture_output=True, text=True, timeout=600, **kw)
    assert res.returncode == 0, (res.stdout + res.stderr)[-3000:]
    return res.stdout.strip()


def python(code, *args, cwd=ROOT, **env):
    "What a fresh interpreter prints when it runs `code`; a warning is an error."
    return run(sys.executable, '-W', 'error', '-c', code, *map(str, args), cwd=cwd, env=os.environ | env)


def command(name, *args, cwd, out):
    """A process, not yet started, that runs a module or a Python file as a command; what it says goes to the file `out`. It is forked from this one,
    where the heavy libraries are loaded already, and so saves the seconds of a fresh interpreter."""
    def body():
        os.chdir(cwd)
        sys.argv[:] = [str(name), *map(str, args)]
        sys.stdout = sys.stderr = open(out, 'w', buffering=1)
        sys.modules.pop(name, None)
        runpy.run_path(name, run_name='__main__') if str(name).endswith('.py') else runpy.run_module(name, run_name='__main__', alter_sys=True)
    return multiprocessing.get_context('fork').Process(target=body)


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    "What the wheel holds, unpacked, with the wheel itself beside it: built from the sdist, as pip would."
    out = tmp_path_factory.mktemp('dist')
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, ROOT)
    run(sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', out/'installed', *out.glob('*.whl'))
    return out/'installed'


@pytest.fixture
def offline(monkeypatch):
    "No name of another host can be looked up."
    def refuse(host, *args, **kw): raise OSError(f'{host} was asked for: this runs with no network')
    if not os.environ.get('NB_FLAGS'): monkeypatch.setattr(socket, 'getaddrinfo', refuse)


ONCE = ['site', 'wheel', 'trained', 'unbroken', 'run', 'single', 'elsewhere']      # fixtures that take long


def pytest_itemcollected(item):
    "The tests that use one of these fixtures go to one process, which makes it once."
    for name in [name for name in ONCE if name in getattr(item, 'fixturenames', ())][:1]:
        item.add_marker(pytest.mark.xdist_group(name))
        # From pytest 9.2 on xdist 3.8 writes the group where nobody reads it, and the mark alone does nothing.
        if 'PYTEST_XDIST_WORKER' in os.environ and hasattr(item, '_id'): item._id = type(item._id).parse(f'{item.nodeid}@{name}')


LONG = ['test_ends', 'test_exercises', 'test_notebook', 'test_one_changed_name']


def how_long(item):
    "Seconds that a long test takes, as `make times` measured its lesson; 0 for any other."
    if item.originalname not in LONG: return 0
    nb = item.callspec.params.get('nb')
    return json.loads((ROOT/'tools/times.json').read_text()).get(nb and nb.name, 1000)


@pytest.hookimpl(trylast=True)     # after what -k, -m and --deselect leave out
def pytest_collection_modifyitems(config, items):
    """The test of a lesson's exercises runs all its other cells too, asserts included: the lesson is not run twice. The longest tests come first,
    so that at the end no process waits for one."""
    ids = {i.callspec.id for i in items if i.originalname == 'test_exercises'}
    twice = [i for i in items if i.originalname == 'test_notebook' and i.callspec.id in ids]
    if twice: config.hook.pytest_deselected(items=twice)
    items[:] = sorted((i for i in items if i not in twice), key=how_long, reverse=True)


def find_chromium():
    "Where Chromium is: in the variable CHROME or on the path."
    return next(filter(None, map(shutil.which, [os.environ.get('CHROME', ''), 'chromium', 'chromium-browser', 'google-chrome'])), None)


def chromium():
    "Where Chromium is, installed from Debian's packages first if it or its driver is missing and that is possible; None without both."
    def there(): return find_chromium() if shutil.which('chromedriver') else None
    if not there() and os.geteuid() == 0 and shutil.which('apt-get'):
        for args in ['update', 'install -y --no-install-recommends chromium chromium-driver']:
            subprocess.run(['apt-get', '-qq', *args.split()], stdin=subprocess.DEVNULL,
                           env=os.environ | {'DEBIAN_FRONTEND': 'noninteractive'})
    return there()


def pytest_terminal_summary(terminalreporter):
    "One line for what did not run."
    skipped = ' '.join(str(r.longrepr) for r in terminalreporter.stats.get('skipped', []))
    for why in (NO_CHROMIUM, NO_REGISTRY):
        if why in skipped: terminalreporter.write_line(why)


class Browser:
    "Headless Chromium on a site served at `url`; it reaches no other host."
    flags = ('headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking '
             'disable-component-update disable-sync disable-dev-shm-usage')

    def __init__(self, binary, profile, url):
        opts = webdriver.ChromeOptions()
        opts.binary_location, self.url = binary, url
        for flag in [*self.flags.split(), f'user-data-dir={profile}', 'host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']:
            opts.add_argument(f'--{flag}')
        opts.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
        self.driver = webdriver.Chrome(opts, Service(shutil.which('chromedriver')))
        self.js = self.driver.execute_script

    def open(self, page, width=1300, scheme='light'):
        "Open a page as on a screen of this width that prefers a light or a dark scheme; wait until it is whole."
        self.log()
        cdp = self.driver.execute_cdp_cmd
        cdp('Emulation.setEmulatedMedia', {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]})
        cdp('Emulation.setDeviceMetricsOverride', dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 600))
        self.driver.get(self.url + page)
        self.driver.execute_async_script('document.fonts.ready.then(arguments[0])')

    def log(self):
        "Console messages, and requests to other hosts, since the page was opened."
        events = [json.loads(e['message'])['message'] for e in self.driver.get_log('performance')]
        urls = [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']
        return ([e['message'] for e in self.driver.get_log('browser')],
                [u for u in urls if not u.startswith((self.url, 'data:', 'blob:', 'about:', 'chrome:'))])


class Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves files without a line for each."
    def log_message(self, *args): pass


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The folder of the site, built once, by whichever process of the tests asks first."
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent
    with FileLock(shared/'site.lock'):
        if not (shared/'site.built').exists():
            subprocess.run([sys.executable, ROOT/'tools/build_docs.py'], check=True, timeout=600)
            (shared/'site.built').touch()
    return CFG.doc_path


@pytest.fixture(scope='session')
def browser(site, tmp_path_factory):
    "A browser on the site. Without Chromium: a failure in CI, one line elsewhere."
    binary = chromium()
    if not binary: not_here(NO_CHROMIUM)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    b = Browser(binary, tmp_path_factory.mktemp('profile'), f'http://127.0.0.1:{server.server_port}/')
    yield b
    b.driver.quit()
    server.shutdown(), server.server_close()
