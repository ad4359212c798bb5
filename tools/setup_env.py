"""Make the course's environment: a venv with the versions in lock.txt. Plain Python, so that it can say what is missing.

Usage: python3 tools/setup_env.py VENV [--system-site-packages]
"""
import argparse
import configparser
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys

CAUSES = [  # what pip or venv says, what it means
    (r'No space left on device|Errno 28',
     'the disk is full: free some space (the environment takes about 2 GB, several more where pip fetches the CUDA build of torch)'),
    (r'NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|MaxRetryError|NameResolution|Connection refused',
     'pip cannot reach its package index: the first set-up needs a network, nothing after it does'),
    (r'No matching distribution found for (\S+)',
     'pip finds no {0} for this Python where it looks: see its index settings and the network'),
    (r'ensurepip is not|No module named (pip|venv|ensurepip)',
     'Python has no venv: install it (Debian and Ubuntu: apt install python3-venv)'),
    (r'require a different python version: .*?Requires-Python ([^;\n]+)',
     'a package of lock.txt wants Python {0}, this is %s: run make with PYTHON=..., the path of another one' % platform.python_version()),
]


def stop(why):
    "End with one line."
    sys.exit('set-up: ' + why)


def explain(err):
    "The cause that an error text names, or the text's last lines."
    if shutil.disk_usage('.').free < 2**25: err = 'Errno 28'
    error = re.search('^ERROR.*', err, re.M | re.S)     # before it, warnings of tries that were repeated; they explain only that nothing was found
    said = error.group() if error and 'No matching distribution' not in error.group() else err
    for pattern, cause in CAUSES:
        found = re.search(pattern, said)
        if found: stop(cause.format(*found.groups()))
    stop('failed with\n' + '\n'.join(err.strip().splitlines()[-20:]))


def run(*cmd):
    "Run a command, its output and its warnings shown as they come; if it fails, say why in one line."
    said = []
    with subprocess.Popen(cmd, stderr=subprocess.PIPE, universal_newlines=True) as process:
        for line in process.stderr:
            said.append(line)
            if line.startswith('WARNING'): print(line, end='', flush=True)
    if process.returncode: explain(''.join(said))


def constraints(folder, keep_torch):
    "The lock file; without its line for torch where the machine's own torch is to be used."
    if not keep_torch: return 'lock.txt'
    path = os.path.join(folder, 'constraints.txt')
    with open('lock.txt') as src, open(path, 'w') as dst: dst.writelines(line for line in src if not line.startswith('torch=='))
    return path


def stale(venv):
    "Whether an environment is of another Python, of one that is gone, or of another folder: one that was moved."
    try:
        with open(os.path.join(venv, 'pyvenv.cfg')) as f: made = dict(line.strip().split(' = ', 1) for line in f if ' = ' in line)
    except OSError: return True
    return (made.get('version') != platform.python_version() or not os.path.exists(made.get('executable', ''))
            or not made.get('command', '').endswith(' ' + os.path.abspath(venv)))


def main():
    "Check Python, make the venv, install the locked versions and this package."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('venv')
    parser.add_argument('--system-site-packages', action='store_true', help="use the machine's own torch")
    args = parser.parse_args()

    ini = configparser.ConfigParser()
    ini.read('settings.ini', encoding='utf-8')
    need = ini['DEFAULT']['min_python']
    if sys.version_info < tuple(map(int, need.split('.'))):
        stop('Python %s or newer is needed, %s is %s: run make with PYTHON=python%s' % (need, sys.executable, sys.version.split()[0], need))
    tested = re.findall(r'Python :: (3\.\d+)', ini['DEFAULT']['classifiers'])
    if platform.python_version().rpartition('.')[0] not in tested:
        print('This is Python %s. The course is tested on %s' % (platform.python_version(), ', '.join(tested)), flush=True)
    if not importlib.util.find_spec('ensurepip') or not importlib.util.find_spec('venv'): explain('No module named venv')

    print('Setting up %s (once; torch is a large download)' % args.venv, flush=True)
    mark = os.path.join(args.venv, '.made_here')      # one that somebody else made is never cleared
    ours = os.path.exists(mark)
    flags = ['--clear']*(ours and stale(args.venv)) + ['--system-site-packages']*args.system_site_packages
    ours = ours or not os.path.exists(args.venv)
    try: run(sys.executable, '-m', 'venv', *flags, args.venv)
    except OSError as e: explain(str(e))
    if ours: open(mark, 'w').close()
    python = os.path.join(args.venv, 'bin', 'python')
    run(python, '-m', 'pip', 'install', '--disable-pip-version-check', '-c', constraints(args.venv, args.system_site_packages),
        '-e', '.[dev]')


if __name__ == '__main__':
    try: main()
    except KeyboardInterrupt: stop('stopped. Run it again to go on.')
