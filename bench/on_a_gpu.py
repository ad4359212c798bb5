"""Guided steps a second on a GPU: Stable Diffusion 1.x's shape, random weights, the networks by hand beside the library's.

One call measures all of it in under ten minutes: `python bench/on_a_gpu.py`. It needs torch and fastcore; without diffusers its
arms are left out, with a word. Each job is a process of its own, so that one that fails or hangs costs only itself; the most
important come first. sd_deepdive/data/on_a_gpu.json is written after each arm. `--only JOB ...` measures some jobs again and keeps
the rest. `--small` runs the embedded model's shape, few steps, on any CPU in a minute: to try the script itself.

Same for all arms: float16, one text, guidance 7.5, Euler's steps, cudnn.benchmark on. Seconds are those of whole runs of `--steps`
guided steps, text and decoding not counted, the device waited for at the end of each; the median of several runs counts.
"""
import argparse, datetime, gc, importlib.util, json, os, platform, signal, statistics, subprocess, sys, tempfile, time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD, EMBEDDED = ROOT/'sd_deepdive'/'data'/'on_a_gpu.json', ROOT/'sd_deepdive'/'embedded'
sys.path.insert(0, str(ROOT))
G = 7.5

# name: (seconds that it needs at least, seconds after which it is stopped), in the order of importance
JOBS = {'ours': (20, 170), 'ours compiled 1': (40, 200), 'diffusers': (20, 100), 'diffusers compiled 1': (40, 200), 'ours compiled 8': (40, 170),
        'ours tuned 1': (60, 400), 'diffusers tuned 1': (60, 400), 'ours tuned 8': (60, 400), 'diffusers compiled 8': (40, 200)}
SMALL = ['ours', 'ours compiled 1', 'diffusers', 'diffusers compiled 1']      # the others do the same to other numbers
GOALS = {'steps a second at batch 1': (105, 150), 'times diffusers, eager': (2, 2), 'times diffusers, compiled': (1.2, 1.2),
         'share of the matmul rate at batch 8': (.45, .45)}

VAE = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, sample_size=512, down_block_types=['DownEncoderBlock2D']*4,
           up_block_types=['UpDecoderBlock2D']*4)
FULL = dict(unet=dict(sample_size=64, cross_attention_dim=768), vae=VAE,
            text_encoder=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))


# The parent: starts jobs, keeps the record -----------------------------------------------------------------------------

def save(path, record):
    "Write the record as a whole or not at all."
    if path is None: return
    part = path.with_suffix('.part')
    part.write_text(json.dumps(record, indent=1) + '\n')
    part.replace(path)


def merge(record, finding):
    "Put what a job found into its place."
    *path, last = finding['path']
    place = record
    for name in path: place = place.setdefault(name, {})
    place[last] = finding['value']
    if path[:1] == ['arms']: record.get('left_out', {}).pop(f'{path[1]}, batch {last}', None)
    if path == ['left_out'] and ', batch ' in last:     # what an arm did before does not stand for now
        name, _, batch = last.rpartition(', batch ')
        record.get('arms', {}).get(name, {}).pop(batch, None)


def best(arms, batch, prefix, without=None):
    "The fastest arm by the beginning of its name, and its figures."
    rows = [(r[batch]['steps_per_second'], name) for name, r in arms.items() if batch in r and name.startswith(prefix) and name != without]
    return max(rows, default=(None, None))


def goals(record):
    "What the goals are about, as far as it was measured."
    arms, batches = record.get('arms', {}), record['batches']
    one, most = str(batches[0]), str(batches[-1])
    ours, name = best(arms, one, 'ours')
    eager = arms.get('diffusers', {}).get(one, {}).get('steps_per_second')
    compiled, _ = best(arms, one, 'diffusers', without='diffusers')
    many, many_name = best(arms, most, 'ours')
    rate = next(iter(record.get('matmul_tflops', {}).values()), None)      # in the arms' precision
    found = {'steps a second at batch 1': ours, 'times diffusers, eager': ours and eager and ours/eager,
             'times diffusers, compiled': ours and compiled and ours/compiled,
             'share of the matmul rate at batch 8': many and rate and many*record['tflop']['step'][most]/rate}
    by = dict.fromkeys(list(found)[:3], name) | {'share of the matmul rate at batch 8': many_name}
    return {what: dict(value=value, by=by[what], at_least=GOALS[what][0], goal=GOALS[what][1], reached=value >= GOALS[what][0])
            for what, value in found.items() if value}


def stop(process):
    "End a job and the compilers that it started."
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    process.wait()


def run_job(name, args, folder, seconds, found):
    "One job in a process of its own; `found` gets each of its findings. None, or why it did not end."
    lines, log = folder/'findings.jsonl', folder/'log.txt'
    lines.write_text('')
    command = [sys.executable, __file__, '--job', name, '--folder', folder, '--steps', args.steps, '--times', args.times] + ['--small']*args.small
    with log.open('w') as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, cwd=ROOT, start_new_session=True)
    end, read = time.monotonic() + seconds, 0
    try:
        while True:
            done = process.poll() is not None      # before the last look at the file
            new = lines.read_text().split('\n')[read:-1]
            for line in new: found(json.loads(line))
            read += len(new)
            if done: break
            if time.monotonic() > end: return f'stopped after {seconds:.0f} s'
            time.sleep(.2)
    finally: stop(process)
    if process.returncode == 0: return
    said = [line for line in log.read_text(errors='replace').splitlines() if line.strip()]
    return f'ended with {process.returncode}: {" ".join(said[-1:])[-400:]}'


def measure(args, record):
    "All jobs, as long as there is time."
    began, wanted = time.monotonic(), args.only or (SMALL if args.small else list(JOBS))
    record.setdefault('left_out', {})
    def found(finding):
        merge(record, finding)
        record['goals'] = goals(record)
        save(args.record, record)
        if finding['path'][0] == 'arms': print(f'{time.monotonic() - began:5.0f} s  {words(finding)}', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in JOBS:
            if name not in wanted: continue
            least, most = JOBS[name]
            left = args.seconds - (time.monotonic() - began)
            if name.startswith('diffusers') and not importlib.util.find_spec('diffusers'): why = 'diffusers is not installed'
            elif left < least: why = f'no time: {max(0, left):.0f} s were left'
            else: why = run_job(name, args, Path(folder), min(left, most), found)
            record['left_out'].pop(name, None)
            if why: record['left_out'][name] = why; print(f'{time.monotonic() - began:5.0f} s  {name}: {why}', flush=True)
            record['seconds'] = round(time.monotonic() - began)
            save(args.record, record)


def words(finding):
    "An arm in one line."
    (_, name, batch), r = finding['path'], finding['value']
    share = f'   {r["share"]:6.1%} of the matmul rate' if r['share'] else ''
    return f'{name:36} batch {batch}: {r["steps_per_second"]:8.2f} steps a second{share}   error {r["error"]:.1e}   {r["peak_gb"]:.2f} GB   ready after {r["ready"]:.0f} s'


def show(record):
    "The record as tables."
    print(f'\n{record["machine"]}, torch {record["torch"]}; matmul TFLOP/s {record.get("matmul_tflops")}; TFLOP {record.get("tflop")}')
    for name, arms in record.get('arms', {}).items():
        for batch in arms: print(words(dict(path=['arms', name, batch], value=arms[batch])))
    for what in ('decode', 'jobs', 'attention_ms'): print(f'{what}: {json.dumps(record.get(what, {}))}')
    for what, r in record.get('goals', {}).items(): print(f'{what}: {r["value"]:.3g} by "{r["by"]}", wanted {r["at_least"]}, goal {r["goal"]}: {"reached" if r["reached"] else "missed"}')
    for what, why in record['left_out'].items(): print(f'left out: {what}: {why}')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seconds', type=float, default=540, help='time for all jobs')
    parser.add_argument('--steps', type=int, help='guided steps of a run; default: 30, with --small 2')
    parser.add_argument('--times', type=int, help='runs of each arm; default: 5, with --small 2')
    parser.add_argument('--small', action='store_true', help="the embedded model's shape, also without a GPU")
    parser.add_argument('--only', nargs='+', choices=JOBS, help='measure these jobs, and keep the rest of the record')
    parser.add_argument('--record', type=Path, help=f'where to write; default: {RECORD.relative_to(ROOT)}, with --small nowhere')
    parser.add_argument('--job', choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument('--folder', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.steps, args.times = args.steps or (2 if args.small else 30), args.times or (2 if args.small else 5)
    args.record = args.record or (None if args.small else RECORD)
    if args.job: return Job(args).run()
    import torch
    if not args.small and not torch.cuda.is_available(): parser.exit(1, 'There is no GPU here. Use --small to try the script without one.\n')
    keep = json.loads(args.record.read_text()) if args.only and args.record and args.record.exists() else {}
    record = dict(date=datetime.date.today().isoformat(), machine=machine(), torch=torch.__version__, cuda=torch.version.cuda, python=platform.python_version(),
                  diffusers=version('diffusers'), small=args.small, steps=args.steps, times=args.times, guidance_scale=G, batches=[1, 2] if args.small else [1, 8])
    if other := [k for k in ('machine', 'torch', 'diffusers', 'small', 'steps', 'times') if keep and keep.get(k) != record[k]]:
        parser.exit(1, f'{args.record} differs in {", ".join(f"{k} ({keep.get(k)})" for k in other)}. Measure all of it, or give another --record.\n')
    record = keep | record
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # so that the job in progress is ended too
    measure(args, record)
    show(record)


def machine():
    "The GPU, or the processor, in words."
    ask = ['nvidia-smi', '--query-gpu=name,driver_version', '--format=csv,noheader', '--id=0']
    try: return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError): return f'CPU, {os.cpu_count()} cores'


def version(package):
    "Of an installed package, or None."
    from importlib.metadata import PackageNotFoundError, version
    try: return version(package)
    except PackageNotFoundError: return None


# A job: networks with random weights, arms, measures --------------------------------------------------------------------

def random_weights(network, device, dtype, seed):
    "Numbers for a network that has none, the same for the same names and shapes: each layer keeps the variance of what goes in."
    import torch
    g, weights = torch.Generator(device).manual_seed(seed), {}
    for name, w in sorted(network.state_dict().items()):
        if 'embedding.weight' in name: scale = .02
        elif w.ndim > 1: scale = w[0].numel()**-.5
        else: scale = .05
        weights[name] = (torch.randn(w.shape, generator=g, device=device)*scale + (w.ndim == 1 and name.endswith('weight'))).to(dtype)
    return weights


def make(kind, config, device, dtype, seed, memory_format=None):
    "A network of a class, the library's or one by hand, with random weights."
    import torch
    from sd_deepdive.scratch.checkpoints import unfilled
    with unfilled(): network = kind(config) if kind.__module__.startswith('sd_deepdive') else kind(**{k: v for k, v in config.items() if k[0] != '_'})
    network.load_state_dict(random_weights(network, device, dtype, seed), strict=True, assign=True)
    return network.eval().requires_grad_(False).to(memory_format=memory_format or torch.contiguous_format)


class Job:
    "One process: what it needs to measure arms, and the arms of each job."
    def __init__(self, args):
        import torch
        self.torch, self.args, self.began = torch, args, time.perf_counter()
        self.gpu = torch.cuda.is_available()
        self.device, self.dtype = torch.device('cuda' if self.gpu else 'cpu'), torch.float16 if self.gpu else torch.float32
        self.batches = [1, 2] if args.small else [1, 8]
        configs = {name: json.loads((EMBEDDED/name/'config.json').read_text()) for name in FULL} if args.small else FULL
        self.configs, self.last = configs, torch.channels_last
        self.side, self.width = configs['unet']['sample_size'], configs['unet']['cross_attention_dim']
        torch.backends.cudnn.benchmark = True
        if not self.gpu: torch.set_num_threads(1)
        torch.set_grad_enabled(False)

    def find(self, *path, **value):
        "Hand a finding to the parent."
        with (self.args.folder/'findings.jsonl').open('a') as f: f.write(json.dumps(dict(path=path, value=value.pop('value', value))) + '\n')

    def run(self):
        kind, how, batch = (self.args.job.split() + ['', ''])[:3]
        if kind == 'ours' and not how:
            self.guarded('the card', self.card); self.ours(); self.guarded('whole pictures', self.pictures)
            return
        if kind == 'diffusers' and not how: return self.library()
        batch = int(batch) if int(batch) in self.batches else self.batches[-1]
        (self.compiled if kind == 'ours' else self.library_compiled)(how, batch)

    # what all arms begin with
    def inputs(self, batch):
        "Noise, text (uncond above) and times: the same in each process."
        torch = self.torch
        from sd_deepdive.scratch.samplers import Euler
        sampler = Euler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear')
        sampler.set_timesteps(self.args.steps, self.device)
        g = torch.Generator().manual_seed(1)
        noise, text = torch.randn(batch, 4, self.side, self.side, generator=g), torch.randn(2*batch, 77, self.width, generator=g)
        return (noise*sampler.init_noise_sigma).to(self.device, self.dtype), text.to(self.device, self.dtype), sampler

    def unet(self, memory_format=None, dtype=None):
        from sd_deepdive.scratch.unet import UNet
        unet = make(UNet, self.configs['unet'], self.device, self.dtype, 0, memory_format)
        return unet.to(dtype) if dtype else unet

    def wait(self):
        if self.gpu: self.torch.cuda.synchronize()

    def reference(self, batch):
        "The first prediction in single precision, computed once by whoever needs it first."
        torch, file = self.torch, self.args.folder/f'reference_{batch}.pt'
        if not file.exists():
            tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
            unet, (x, text, sampler) = self.unet(dtype=torch.float32), self.inputs(batch)
            x, text = x.float(), text.float()
            x = sampler.scale_model_input(x)
            torch.save(unet(torch.cat([x, x]), sampler.timesteps[0], text).sample.cpu(), file)
            torch.backends.cudnn.allow_tf32 = tf32
            del unet
            if self.gpu: torch.cuda.empty_cache()
        return torch.load(file, weights_only=True)

    def tflop(self, batch):
        "Of one guided step with the text read ahead, counted on tensors without numbers."
        torch, file = self.torch, self.args.folder/f'tflop_{batch}.json'
        if file.exists(): return json.loads(file.read_text())
        from torch.utils.flop_counter import FlopCounterMode
        from sd_deepdive.scratch.unet import UNet
        with torch.device('meta'):
            unet = UNet(self.configs['unet'])
            words = unet.read(torch.empty(2*batch, 77, self.width))
            with FlopCounterMode(display=False) as flops: unet(torch.empty(2*batch, 4, self.side, self.side), torch.tensor(5.), words)
        file.write_text(json.dumps(flops.get_total_flops()/1e12))
        return json.loads(file.read_text())

    def measure(self, name, batch, run, first, ready):
        "Time whole runs of an arm, compare its first prediction, and report."
        torch = self.torch
        ref = self.reference(batch)
        off = first().float().cpu() - ref
        error = (off.abs().max()/(ref.max() - ref.min())).item()
        run(); self.wait()
        if self.gpu: torch.cuda.reset_peak_memory_stats()
        took = []
        for _ in range(self.args.times):
            start = time.perf_counter(); x = run(); self.wait(); took.append(time.perf_counter() - start)
        steps = self.args.steps/statistics.median(took)
        rate, work = self.rate(), self.tflop(batch)
        self.find('tflop', 'step', str(batch), value=work)
        self.find('arms', name, str(batch), steps_per_second=steps, slowest=self.args.steps/max(took), fastest=self.args.steps/min(took), share=steps*work/rate,
                  error=error, finite=bool(x.isfinite().all()), ready=ready, peak_gb=torch.cuda.max_memory_allocated()/1e9 if self.gpu else 0.,
                  reserved_gb=torch.cuda.max_memory_reserved()/1e9 if self.gpu else 0.)      # what a CUDA graph holds is only in this

    def rate(self):
        "The measured matmul rate in the arms' precision, in TFLOP/s, of the first job or of this one."
        file = self.args.folder/'rate.json'
        if not file.exists(): self.card()
        return json.loads(file.read_text())

    def guarded(self, what, call):
        "A measure that may fail without harm to the others."
        try: call()
        except Exception as e: self.find('left_out', what, value=f'{type(e).__name__}: {str(e).strip()}'[:400])

    # the card
    def card(self):
        "What the card can do: matrix products, copies, attention."
        torch, dtypes = self.torch, dict(float16=self.torch.float16, bfloat16=self.torch.bfloat16) if self.gpu else dict(float32=self.torch.float32)
        n, times = (8192, 30) if self.gpu else (256, 5)
        rates = {name: 2e-12*n**3/self.seconds(torch.matmul, *(torch.randn(n, n, device=self.device).to(dtype) for _ in range(2)), times=times) for name, dtype in dtypes.items()}
        (self.args.folder/'rate.json').write_text(json.dumps(rates[str(self.dtype).removeprefix('torch.')]))
        self.find('matmul_tflops', value=rates)
        a = torch.randn(int(1e9 if self.gpu else 1e6), device=self.device)
        self.find('copy_tb_s', value=2*a.nbytes/self.seconds(torch.empty_like(a).copy_, a, times=times)/1e12)
        for batch in self.batches: self.find('attention_ms', str(batch), value=self.attention(batch))

    def seconds(self, call, *args, times=20):
        "Of one call, the mean of many in a row after three to warm up."
        for _ in range(3): call(*args)
        self.wait(); start = time.perf_counter()
        for _ in range(times): call(*args)
        self.wait()
        return (time.perf_counter() - start)/times

    def attention(self, batch):
        "Milliseconds of the UNet's self-attention at its two largest sizes, together, by each kernel that can do it."
        torch, found = self.torch, {}
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention
        heads, widths = self.configs['unet'].get('attention_head_dim', 8), self.configs['unet'].get('block_out_channels', (320, 640, 1280, 1280))
        shapes = [(2*batch, self.side**2//4**i, heads, widths[i]//heads) for i in range(2)]
        sets = [[torch.randn(s, device=self.device, dtype=self.dtype).transpose(1, 2) for _ in range(3)] for s in shapes]
        for name in ('FLASH_ATTENTION', 'CUDNN_ATTENTION', 'EFFICIENT_ATTENTION', 'MATH'):
            if name == 'MATH' and self.gpu: continue      # it needs much memory
            try:
                with sdpa_kernel(getattr(SDPBackend, name)): found[name] = sum(1e3*self.seconds(scaled_dot_product_attention, *qkv, times=10) for qkv in sets)
            except RuntimeError: pass     # no kernel of this kind for these shapes
        return found

    def best_attention(self, batch):
        "Inside the `with`, attention tries the fastest kernel first."
        from torch.nn.attention import SDPBackend, sdpa_kernel
        stack = ExitStack()
        if self.gpu and (found := self.attention(batch)):
            order = sorted(found, key=found.get) + [k for k in ('FLASH_ATTENTION', 'EFFICIENT_ATTENTION', 'MATH') if k not in found]
            stack.enter_context(sdpa_kernel([getattr(SDPBackend, k) for k in order], set_priority=True))
        return stack

    # the arms by hand
    def loop(self, unet, batch):
        "The loop of the course, with nothing changed."
        torch = self.torch
        x0, text, sampler = self.inputs(batch)
        words = unet.read(text)
        def ask(x, t):
            x = sampler.scale_model_input(x)
            return unet(torch.cat([x, x]), t, encoder_hidden_states=words).sample
        def run():
            x = x0
            for t in sampler.timesteps_from(0):
                uncond, text = ask(x, t).chunk(2)
                x = sampler.step(uncond + G*(text - uncond), t, x).prev_sample
            return x
        def first(): sampler.timesteps_from(0); return ask(x0, sampler.timesteps[0])
        return run, first

    def step(self, unet, batch, lean):
        """One whole guided step as a function of latents and the number of the step, both on the device: nothing in it asks the
        processor. Given back: that function, the latents to begin with, and the step's number."""
        torch = self.torch
        x0, text, sampler = self.inputs(batch)
        times, sigmas = sampler.timesteps.float(), torch.tensor(sampler.sigmas, device=self.device)
        i = torch.zeros(1, dtype=torch.int64, device=self.device)
        if lean: make_lean(unet, times, i)
        words = unet.read(text)
        def step(x, i):
            sigma, sigma_next = sigmas.index_select(0, i), sigmas.index_select(0, i + 1)
            x_in = (x/(sigma**2 + 1).sqrt()).to(x.dtype)
            both = unet(torch.cat([x_in, x_in]), times.index_select(0, i), words).sample
            uncond, text = both.float().chunk(2)
            x = x.float() + (sigma_next - sigma)*(uncond + G*(text - uncond))
            return x.to(both.dtype).contiguous(), both      # strides as they came, or it is compiled twice
        return step, x0, i

    def plainly(self, step, x0, i):
        "The step called again and again."
        def run():
            i.zero_(); x = x0
            for _ in range(self.args.steps): x, _ = step(x, i); i.add_(1)
            return x
        def first(): i.zero_(); return step(x0, i)[1]
        return run, first

    def captured(self, step, x0, i):
        "The step recorded once as a CUDA graph, and replayed: one launch for all its kernels."
        torch, x = self.torch, x0.clone()
        def once():
            new, both = step(x, i)
            x.copy_(new); i.add_(1)
            return both
        def begin(): i.zero_(); x.copy_(x0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): begin(); once()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): both = once()
        def run():
            begin()
            for _ in range(self.args.steps): graph.replay()
            return x.clone()
        def first(): begin(); graph.replay(); return both.clone()
        return run, first

    def arm(self, name, batch, make_arm):
        "Build an arm and measure it. One that fails is reported, and the next goes on."
        gc.collect()
        if self.gpu: self.torch.cuda.empty_cache(); self.torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            run, first = make_arm()
            first(); self.wait()
            self.measure(name, batch, run, first, time.perf_counter() - start)
        except Exception as e: self.find('left_out', f'{name}, batch {batch}', value=f'{type(e).__name__}: {str(e).strip()}'[:400])

    def ours(self):
        "The arms that need no compiler, decoding, and the memory that whole jobs need."
        last = self.last
        for batch in self.batches:
            self.arm('ours', batch, lambda: self.loop(self.unet(), batch))
            self.arm('ours, channels last', batch, lambda: self.loop(self.unet(last), batch))
            with self.best_attention(batch):
                for name, how, lean in (('', None, False), (', channels last', last, False), (', channels last, lean', last, True)):
                    if self.gpu: self.arm(f'ours, CUDA graph{name}', batch, lambda: self.captured(*self.step(self.unet(how), batch, lean)))
                if not self.gpu: self.arm('ours, channels last, lean', batch, lambda: self.plainly(*self.step(self.unet(last), batch, True)))
        if not self.gpu: self.find('left_out', 'ours, CUDA graph', value='CUDA graphs need a GPU')

    def compiled(self, how, batch):
        "torch.compile of the whole step, and that as a CUDA graph. `tuned` lets the compiler try kernels."
        torch, name = self.torch, f'ours, {how}'
        options = dict(max_autotune_gemm=True, max_autotune_conv_backends='ATEN', coordinate_descent_tuning=True, conv_1x1_as_mm=True) if how == 'tuned' else None
        for lean, attention in ((True, self.best_attention), (False, lambda batch: ExitStack())):      # the second only if the first fails
            try:
                with attention(batch):
                    start = time.perf_counter()
                    step, x0, i = self.step(self.unet(self.last), batch, lean)
                    fast = torch.compile(step, fullgraph=True, dynamic=False, **dict(options=options) if self.gpu else dict(backend='eager'))
                    fast(x0, i); self.wait()
                    self.find('compile_seconds', f'{name}, batch {batch}', value=time.perf_counter() - start)
                    if self.gpu: self.arm(f'{name}, CUDA graph', batch, lambda: self.captured(fast, x0, i))
                    self.arm(name, batch, lambda: self.plainly(fast, x0, i))
                break
            except Exception as e:
                self.find('left_out', f'{name}, batch {batch}, {"lean" if lean else "as it is"}', value=f'{type(e).__name__}: {str(e).strip()}'[:400])
                torch.compiler.reset()
        if not self.gpu: self.find('left_out', f'{name}, CUDA graph', value='CUDA graphs need a GPU; compiled without inductor here')

    def pictures(self):
        "Decoding, and prompt to picture: seconds and peak memory."
        torch = self.torch
        from sd_deepdive.scratch.autoencoder import Autoencoder
        from sd_deepdive.scratch.text_encoder import TextEncoder
        for name, how in (('ours', None), ('ours, channels last', self.last)):
            vae = make(Autoencoder, self.configs['vae'], self.device, self.dtype, 2, how)
            self.decode(name, lambda x: vae.decode(x).sample)
        parts = self.unet(), make(TextEncoder, self.configs['text_encoder'], self.device, self.dtype, 3), vae
        for batch in (1, 4, 8) if not self.args.small else (1, 2):
            self.wait()
            try:
                self.job(batch, *parts)     # once to warm up: choosing kernels takes memory too
                if self.gpu: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter(); self.job(batch, *parts); self.wait()
                self.find('jobs', str(batch), seconds=time.perf_counter() - start, steps=self.args.steps, peak_gb=torch.cuda.max_memory_allocated()/1e9 if self.gpu else 0.)
            except RuntimeError as e: self.find('left_out', f'prompt to picture, batch {batch}', value=str(e)[:400])

    def job(self, batch, unet, text_encoder, vae):
        "Prompt to picture: text, the loop, decoding."
        torch = self.torch
        x, _, sampler = self.inputs(batch)
        text = text_encoder(torch.randint(0, 49406, (2*batch, 77), device=self.device)).last_hidden_state
        words = unet.read(text)
        for t in sampler.timesteps:
            x_in = sampler.scale_model_input(x)
            uncond, text = unet(torch.cat([x_in, x_in]), t, words).sample.chunk(2)
            x = sampler.step(uncond + G*(text - uncond), t, x).prev_sample
        return vae.decode(x/.18215).sample

    def decode(self, name, call):
        "Milliseconds for a picture."
        for batch in self.batches:
            x = self.inputs(batch)[0]/14
            try: self.find('decode', name, str(batch), ms_a_picture=1e3*self.seconds(call, x, times=10 if self.gpu else 1)/batch)
            except RuntimeError as e: self.find('left_out', f'decode, {name}, batch {batch}', value=str(e)[:400])

    # the library's arms
    def library_loop(self, unet, batch):
        "The loop of the library's pipeline."
        torch = self.torch
        from diffusers import EulerDiscreteScheduler
        scheduler = EulerDiscreteScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear')
        x0, text, _ = self.inputs(batch)
        def ask(x, t):
            torch.compiler.cudagraph_mark_step_begin()
            return unet(scheduler.scale_model_input(torch.cat([x, x]).contiguous(), t).contiguous(), t, encoder_hidden_states=text, return_dict=False)[0]
        def run():
            scheduler.set_timesteps(self.args.steps, device=self.device); x = x0
            for t in scheduler.timesteps:
                uncond, text = ask(x, t).chunk(2)
                x = scheduler.step(uncond + G*(text - uncond), t, x, return_dict=False)[0]
            return x
        def first(): scheduler.set_timesteps(self.args.steps, device=self.device); return ask(x0, scheduler.timesteps[0]).clone()
        return run, first

    def library_unet(self, memory_format=None):
        from diffusers import UNet2DConditionModel
        return make(UNet2DConditionModel, self.configs['unet'], self.device, self.dtype, 0, memory_format)

    def library(self):
        "diffusers as it is, and channels last."
        from diffusers import AutoencoderKL
        for batch in self.batches:
            self.arm('diffusers', batch, lambda: self.library_loop(self.library_unet(), batch))
            self.arm('diffusers, channels last', batch, lambda: self.library_loop(self.library_unet(self.last), batch))
        vae = make(AutoencoderKL, self.configs['vae'], self.device, self.dtype, 2)
        self.decode('diffusers', lambda x: vae.decode(x, return_dict=False)[0])

    def library_compiled(self, how, batch):
        "diffusers compiled as its documentation has it: channels last, whole graph, CUDA graphs by the compiler."
        mode = dict(mode='max-autotune' if how == 'tuned' else 'reduce-overhead') if self.gpu else dict(backend='eager')
        unet = self.torch.compile(self.library_unet(self.last), fullgraph=True, dynamic=False, **mode)
        self.arm(f'diffusers, {how}', batch, lambda: self.library_loop(unet, batch))


def make_lean(unet, times, i):
    """Do once what is the same at each step: each residual block finds what it adds for the time in a table, at row `i`; queries, keys
    and values of self-attention come from one matrix product instead of three. The same function; the UNet is changed in place."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from sd_deepdive.scratch.autoencoder import Attention, ResnetBlock
    from sd_deepdive.scratch.text_encoder import attend
    from sd_deepdive.scratch.unet import time_waves

    class LookUp(nn.Module):
        def __init__(self, table): super().__init__(); self.register_buffer('table', table); self.register_buffer('i', i)
        def forward(self, time): return self.table.index_select(0, self.i)

    class OneProjection(Attention):
        def forward(self, x): return self.to_out[0](attend(*F.linear(x, self.to_qkv).chunk(3, -1), self.heads))

    waves = time_waves(times, unet.config.block_out_channels[0]).to(unet.dtype)
    time_vectors = F.silu(unet.time_embedding(waves))
    for layer in list(unet.modules()):
        if isinstance(layer, ResnetBlock): layer.time_emb_proj = LookUp(layer.time_emb_proj(time_vectors))
        elif type(layer) is Attention:
            layer.to_qkv = nn.Parameter(torch.cat([layer.to_q.weight, layer.to_k.weight, layer.to_v.weight]), requires_grad=False)
            del layer.to_q, layer.to_k, layer.to_v
            layer.__class__ = OneProjection
    unet.time_embedding = nn.Identity()


if __name__ == '__main__': main()
