"""Hostile rewards of users: a file each, with what must come of it.

A case either trains (`says` is empty; `scores` are those of two responses "0" and "1" if they matter) or ends in a sentence that
matches `says`. No case may hang, crash or show a traceback of ours. In files, `{folder}` is the folder of the file.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

HEAD = "import os, sys, time\n"
ONE = "def reward(completions, **columns):\n    {}"

BAD = "bad"
"""Score of a value that is not finite."""


@dataclass(frozen=True)
class Case:
    name: str
    source: str
    says: str = ""
    scores: tuple[Any, ...] = ()
    """Numbers, None for an answer that was not found, or BAD."""
    timeout_s: float = 60.0
    alone: bool = False
    """It ends or disturbs its process, so it needs one of its own."""
    reference: str = "mine.py:reward"
    code: int | None = None
    """Exit code of the run, where it is neither that of a success nor that of an error."""


def body(name: str, text: str, says: str = "", **fields: Any) -> Case:
    """A case by the body of its function."""
    return Case(name, HEAD + ONE.format(textwrap.indent(textwrap.dedent(text), "    ").strip()), says, **fields)


def value(name: str, entry: str, says: str = "", score: Any = None) -> Case:
    """A case in which the second reward is an expression."""
    return body(
        name,
        f"""
        import numpy as np, torch, decimal, fractions
        return [0.0] + [{entry} for _ in completions[1:]]
        """,
        says, scores=() if says else (0.0, score),
    )  # fmt: skip


def file(name: str, source: str, says: str = "", **fields: Any) -> Case:
    return Case(name, textwrap.dedent(source), says, **fields)


TAKES = "return [float(len(c) % 2) for c in completions]"
NOT_A_NUMBER = "for response 1"

VALUES = [
    value("10**400", "10**400", score=BAD),
    value("-10**400", "-10**400", score=BAD),
    value("10**5000", "10**5000", score=BAD),
    value("1e308", "1e308", score=BAD),
    value("-1e308", "-1e308", score=BAD),
    value("1e39, beyond float32", "1e39", score=BAD),
    value("nan", "float('nan')", score=BAD),
    value("inf", "float('inf')", score=BAD),
    value("-inf", "float('-inf')", score=BAD),
    value("5e-324", "5e-324", score=5e-324),
    value("bool", "True", score=1.0),
    value("None", "None", score=None),
    value("numpy scalar", "np.float16(0.5)", score=0.5),
    value("numpy bool", "np.bool_(True)", score=1.0),
    value("numpy integer", "np.uint8(3)", score=3.0),
    value("numpy long double beyond float64", "np.longdouble('1e400')", score=BAD),
    value("0-d array", "np.array(0.5)", score=0.5),
    value("one-element array", "np.array([0.5])", score=0.5),
    value("one-element tensor", "torch.tensor([[0.5]], requires_grad=True)", score=0.5),
    value("0-d bfloat16 tensor", "torch.tensor(0.5, dtype=torch.bfloat16)", score=0.5),
    value("two-element tensor", "torch.tensor([1.0, 2.0])", "which is not one number"),
    value("empty tensor", "torch.tensor([])", "which is not one number"),
    value("meta tensor", "torch.ones((), device='meta')", "which is not one number"),
    value("two-element array", "np.array([1, 2])", "which is not one number"),
    value("numpy date", "np.datetime64('2024-01-01')", NOT_A_NUMBER),
    value("Decimal", "decimal.Decimal('0.5')", score=0.5),
    value("Decimal sNaN", "decimal.Decimal('sNaN')", score=BAD),
    value("Fraction", "fractions.Fraction(1, 2)", score=0.5),
    value("huge Fraction", "fractions.Fraction(10**400, 3)", score=BAD),
    value("complex", "1j", NOT_A_NUMBER),
    value("string", "'1.0'", NOT_A_NUMBER),
    value("bytes", "b'1'", NOT_A_NUMBER),
    value("list in a list", "[1.0]", NOT_A_NUMBER),
    value("tuple of score and details", "(1.0, {'format': 1.0})", NOT_A_NUMBER),
    value("dict of score and details", "{'score': 1.0, 'why': 'text'}", NOT_A_NUMBER),
    value("exception object", "ValueError('no')", NOT_A_NUMBER),
    value("class", "float", NOT_A_NUMBER),
    value("function", "(lambda: 1.0)", NOT_A_NUMBER),
    value("module", "np", NOT_A_NUMBER),
    file(
        "coroutines that nobody awaited",
        """
        async def one(text):
            return 1.0
        def reward(completions, **columns):
            return [one(text) for text in completions]
        """,
        "for response 0; return a number or None; await it",
    ),
]  # fmt: skip

SHAPES = [
    body("nothing", "pass", r"returned None \(a NoneType\); return a list"),
    body("one number", "return 1.0", r"returned 1.0 \(a float\); return a list"),
    body("0-d tensor", "import torch\nreturn torch.tensor(1.0)", "return a list with one number"),
    body("a string", "return '01'", "returned '01'"),
    body("bytes", "return bytes(len(completions))", "returned b'"),
    body("a set", "return {0.0, 1.0}", "which has no order of its own"),
    body("keys of a dict", "return {0.0: 1, 1.0: 2}.keys()", "which has no order of its own"),
    body("a dict", "return {'reward': [0.0 for c in completions]}", "which has no order of its own"),
    body("too few", "return []", r"returned 0 rewards for \d+ responses"),
    body("too many", "return [0.0] * 1000", r"returned 1000 rewards for \d+ responses"),
    body("nested", "return [[0.0] for c in completions]", "for response 0"),
    body("two-dimensional array", "import numpy as np\nreturn np.zeros((len(completions), 2))", "for response 0"),
    body("a column of an array", "import numpy as np\nreturn np.zeros((len(completions), 1))", "for response 0"),
    body("rewards and details", "return [0.0 for c in completions], {'log': 'text'}", r"returned 2 rewards|for response 0"),
    body("an exception", "return ValueError('no')", "return a list with one number"),
    body("a class", "return list", "return a list with one number"),
    body("tuple", "return tuple(float(len(c) % 2) for c in completions)", scores=(1.0, 1.0)),
    body("generator", "return (float(len(c) % 2) for c in completions)", scores=(1.0, 1.0)),
    body("map", "return map(lambda c: float(len(c) % 2), completions)", scores=(1.0, 1.0)),
    body("tensor with gradient", "import torch\nreturn torch.ones(len(completions), requires_grad=True)", scores=(1.0, 1.0)),
    body("endless iterator", "import itertools\nreturn itertools.count()", "returned more than"),
    body("endless repetition", "import itertools\nreturn itertools.repeat(0.0)", "returned more than"),
    body("a generator that raises", "def lazy():\n    yield 0.0\n    raise KeyError('late')\nreturn lazy()", r"raised KeyError: 'late' .*mine.py, line 5"),
    body("a generator that exits", "def lazy():\n    yield 0.0\n    sys.exit(3)\nreturn lazy()", "raised SystemExit: 3"),
    body("a generator that sleeps", "def lazy():\n    yield 0.0\n    time.sleep(5)\nreturn lazy()", "did not return within", timeout_s=0.3),
    file("async generator", "async def reward(completions, **columns):\n    for each in completions:\n        yield 1.0\n", "from an `async def`"),
    file("coroutine of coroutine", "async def inner():\n    return [0.0]\nasync def reward(completions, **columns):\n    return inner()\n", "or await it"),
    file("async", f"import asyncio\nasync def reward(completions, **columns):\n    await asyncio.sleep(0)\n    {TAKES}\n", scores=(1.0, 1.0)),
    file("async that hangs", "import asyncio\nasync def reward(completions, **columns):\n    await asyncio.sleep(5)\n", "did not return within", timeout_s=0.3),
]  # fmt: skip


def odd(method: str, text: str, says: str, **fields: Any) -> Case:
    """An object that stands for the list of rewards or, for `__float__`, for one of them, with a hostile method."""
    base = "float" if method == "__float__" else "list"
    given = "[Odd() for c in completions]" if base == "float" else "Odd(0.0 for c in completions)"
    return file(
        f"{method}: {text}",
        f"import sys, time\nclass Odd({base}):\n    def {method}(self, *given):\n        {text}\n"
        f"def reward(completions, **columns):\n    return {given}\n",
        says, **fields,
    )  # fmt: skip


OBJECTS = [
    odd("__iter__", "time.sleep(5)", "did not return within", timeout_s=0.3),
    odd("__iter__", "raise RuntimeError('no')", "raised RuntimeError: no"),
    odd("__len__", "raise RuntimeError('no')", ""),
    odd("__getattr__", "raise KeyError('no')", "raised KeyError"),
    odd("__float__", "raise RuntimeError('no')", "raised RuntimeError: no"),
    odd("__float__", "time.sleep(5)", "did not return within", timeout_s=0.3),
    odd("__float__", "sys.exit(0)", "raised SystemExit: 0"),
    file(
        "a repr that fails",
        """
        class Odd:
            def __repr__(self):
                raise RuntimeError("no")
        def reward(completions, **columns):
            return [Odd() for c in completions]
        """,
        "for response 0",
    ),
    file(
        "an exception that cannot be printed",
        """
        class Odd(Exception):
            def __str__(self):
                raise RuntimeError("no")
        def reward(completions, **columns):
            raise Odd()
        """,
        "raised Odd: Odd",
    ),
]

CALLS = [
    body("raises", "raise ValueError('no')", r"raised ValueError: no \(.*mine.py, line 3\)"),
    body("raises deep inside a library", "import json\nreturn json.loads('{')", r"raised JSONDecodeError.*mine.py, line 4\)"),
    body("raises with a cause", "try:\n    1/0\nexcept ZeroDivisionError as e:\n    raise ValueError('no') from e", "raised ValueError: no"),
    body("raises a megabyte", "raise ValueError('x' * 1_000_000)", "raised ValueError: xxx"),
    body("raises a group", "raise ExceptionGroup('several', [ValueError(1), TypeError(2)])", "raised ExceptionGroup: several"),
    body("raises StopIteration", "raise StopIteration", "raised StopIteration"),
    body("raises GeneratorExit", "raise GeneratorExit", "raised GeneratorExit"),
    body("raises KeyboardInterrupt", "raise KeyboardInterrupt", "raised KeyboardInterrupt"),
    body("raises MemoryError", "raise MemoryError", "raised MemoryError"),
    body("endless recursion", "def deeper(): return deeper()\nreturn deeper()", "raised RecursionError"),
    body("sys.exit(0)", "sys.exit(0)", "raised SystemExit: 0"),
    body("sys.exit with a text", "sys.exit('bye')", "raised SystemExit: bye"),
    body("assertion", "assert False", "raised AssertionError"),
    body("sleeps", "time.sleep(5)", "did not return within reward.timeout_s = 0.3 s", timeout_s=0.3),
    body("an endless loop", "while True: pass", "did not return within reward.timeout_s = 0.3 s", timeout_s=0.3),
    body("an endless loop that catches errors", "while True:\n    try:\n        time.sleep(0.01)\n    except Exception:\n        pass", "did not return within", timeout_s=0.3),
    body("an alarm", "import signal\nsignal.signal(signal.SIGALRM, lambda *a: 0)", "raised ValueError.*in place of signals and alarms"),
    body("reads standard input", "input()", "raised (EOFError|OSError)"),
    body("changes its arguments", "completions.clear(); columns.clear()\nreturn []", "returned 0 rewards"),
    body("changes a column", f"[each.clear() for each in columns.get('tags', [])]\n{TAKES}", scores=(1.0, 1.0)),
    body("a thread that never ends", f"import threading\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n{TAKES}", scores=(1.0, 1.0)),
    body("a pool of threads", "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(2) as pool:\n    return list(pool.map(lambda c: 0.5, completions))", scores=(0.5, 0.5)),
    body("a subprocess", f"import subprocess\nassert subprocess.run(['echo', 'hi'], capture_output=True).stdout == b'hi\\n'\n{TAKES}", scores=(1.0, 1.0)),
]  # fmt: skip

SIGNATURES = [
    file("a column that is not there", "def reward(completions, ground_truth):\n    return [0.0]", "asks for 'ground_truth', which the data does not have"),
    file("positional only", "def reward(completions, answer, /, **columns):\n    return [0.5 for c in completions]", scores=(0.5, 0.5)),
    file("positional only with a default", "def reward(completions, scale=2.0, /):\n    return [scale for c in completions]", scores=(2.0, 2.0)),
    file("keyword only", "def reward(*, completions, answer):\n    return [0.5 for c in completions]", scores=(0.5, 0.5)),
    file("only *args", "def reward(*args):\n    return [0.5 for c in args[0]]", r"takes only \*args"),
    file("no parameters", "def reward():\n    return [0.5]", r"returned 1 rewards for \d+ responses"),
    file("no kwargs", f"def reward(completions):\n    {TAKES}", scores=(1.0, 1.0)),
    file("a lambda", "reward = lambda completions, **columns: [0.5 for c in completions]", scores=(0.5, 0.5)),
    file("a partial", "import functools\ndef scaled(scale, completions, **columns):\n    return [scale for c in completions]\nreward = functools.partial(scaled, 0.5)", scores=(0.5, 0.5)),
    file("a callable object", "class Judge:\n    def __call__(self, completions, **columns):\n        return [0.5 for c in completions]\nreward = Judge()", scores=(0.5, 0.5)),
    file("a class", "class reward:\n    def __call__(self, completions, **columns):\n        return [0.5 for c in completions]", "is a class; name a function, or an instance"),
    file("a method without its object", "class Judge:\n    def score(self, completions, **columns):\n        return [0.5 for c in completions]", "asks for 'self'", reference="mine.py:Judge.score"),
    file("a builtin", "reward = max", "does not say what parameters it has"),
    file("a number", "reward = 1.0", "which cannot be called"),
    file("two of one name", "def reward(completions):\n    return ['first']\ndef reward(completions):\n    return [0.5 for c in completions]", scores=(0.5, 0.5)),
]  # fmt: skip

FILES = [
    file("empty file", "", "does not have it; it has no function or class at all"),
    file("another name", "def rewards(completions):\n    return [0.0]", "does not have it; it has rewards"),
    file("syntax error", "def reward(:\n", "running the file failed: SyntaxError"),
    file("indentation error", "def reward(completions):\nreturn 1", "running the file failed: IndentationError"),
    file("null byte", "x = 1\0", "running the file failed"),
    file("import error", "import no_such_package_anywhere", "ModuleNotFoundError: No module named 'no_such_package_anywhere'.*correct it"),
    file("relative import", "from . import helper", "attempted relative import.*PYTHONPATH="),
    file("sys.exit at import", "import sys\nsys.exit(0)", "running the file failed: SystemExit: 0"),
    file("an error at import", "1/0", r"running the file failed: ZeroDivisionError: division by zero \(.*mine.py, line 1\)"),
    file("reads its own file", f"SOURCE = open(__file__).read()\ndef reward(completions, **columns):\n    assert 'SOURCE' in SOURCE and __name__ != '__main__'\n    {TAKES}", scores=(1.0, 1.0)),
    file("a dataclass in it", f"from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Rule:\n    x: int = 0\ndef reward(completions, **columns):\n    {TAKES}", scores=(1.0, 1.0)),
    file("named like a module of Python", "import math\ndef reward(completions, **columns):\n    return [math.floor(0.5) for c in completions]", scores=(0.0, 0.0), reference="math.py:reward"),
    file("named random.py", "import random\ndef reward(completions, **columns):\n    return [random.Random(0).random() * 0 for c in completions]", scores=(0.0, 0.0), reference="random.py:reward"),
    file("trains at import", "import torch\nmodel = torch.nn.Linear(2, 2)\nmodel(torch.ones(2)).sum().backward()\ndef reward(completions, **columns):\n    return [0.0 for c in completions]", scores=(0.0, 0.0)),
    file("turns gradients off at import", "import torch\ntorch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float64)\ntorch.manual_seed(0)\ndef reward(completions, **columns):\n    return [0.0 for c in completions]", scores=(0.0, 0.0)),
]  # fmt: skip

LEAVING = "ended inside the reward function"
PROCESSES = [
    file(
        "multiprocessing.Pool",
        """
        import multiprocessing
        def one(text):
            return float(len(text) % 2)
        def reward(completions, **columns):
            with multiprocessing.Pool(2) as pool:
                return pool.map(one, completions)
        """,
        scores=(1.0, 1.0), alone=True,
    ),
    file(
        "a pool that is kept",
        """
        import multiprocessing
        pool = None
        def one(text):
            return float(len(text) % 2)
        def reward(completions, **columns):
            global pool
            pool = pool or multiprocessing.Pool(2)
            return pool.map(one, completions)
        """,
        scores=(1.0, 1.0), alone=True,
    ),
    file(
        "a pool at import",
        """
        import multiprocessing
        def one(text):
            return float(len(text) % 2)
        pool = multiprocessing.Pool(2)
        def reward(completions, **columns):
            return pool.map(one, completions)
        """,
        scores=(1.0, 1.0), alone=True,
    ),
    file(
        "ProcessPoolExecutor",
        """
        from concurrent.futures import ProcessPoolExecutor
        def one(text):
            return float(len(text) % 2)
        def reward(completions, **columns):
            with ProcessPoolExecutor(2) as pool:
                return list(pool.map(one, completions))
        """,
        scores=(1.0, 1.0), alone=True,
    ),
    file(
        "joblib",
        """
        import joblib
        def reward(completions, **columns):
            return joblib.Parallel(n_jobs=2)(joblib.delayed(abs)(0.5) for c in completions)
        """,
        scores=(0.5, 0.5), alone=True,
    ),
    body("a fork that exits", f"if os.fork() == 0:\n    sys.exit(3)\nos.wait()\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("a fork that returns", f"os.fork()\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("a fork that raises", f"if os.fork() == 0:\n    raise ValueError('child')\nos.wait()\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("a thread that is no daemon", f"import threading\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("an exit handler that sleeps", f"import atexit\natexit.register(time.sleep, 1000)\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("os._exit(0)", "os._exit(0)", LEAVING, alone=True, code=0),
    body("os._exit(3)", "os._exit(3)", LEAVING, alone=True, code=3),
    body("kills itself", "os.kill(os.getpid(), 9)", LEAVING, alone=True, code=-9),
    body("segmentation fault", "import ctypes\nctypes.string_at(0)", LEAVING, alone=True, code=-11),
    body("SIGTERM to itself", f"os.kill(os.getpid(), 15)\n{TAKES}", alone=True),
    body(
        "C code that lets nobody run", "import itertools\nany(x < 0 for x in ()) or sum(itertools.repeat(1))",
        "in code that lets no other thread run .*mine.py, line 4", timeout_s=0.2, alone=True, code=1,
    ),
]  # fmt: skip

DISTURBING = [
    body("os.chdir", f"os.chdir('/')\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("into a folder that goes", f"import tempfile\nwith tempfile.TemporaryDirectory() as folder:\n    os.chdir(folder)\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("os.chdir from a thread that stays", f"import threading\nthreading.Thread(target=lambda: [(os.chdir('/'), time.sleep(0.001)) for _ in range(10000)], daemon=True).start()\n{TAKES}", alone=True),
    file("os.chdir at import", f"import os\nos.chdir('/')\ndef reward(completions, **columns):\n    {TAKES}", scores=(1.0, 1.0), alone=True),
    body("umask", f"os.umask(0o777)\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("environment", f"os.environ.clear()\nos.environ.update(HOME='/nowhere', TMPDIR='/nowhere')\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("closes standard output", f"sys.stdout.close()\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("closes all standard streams", f"for number in (0, 1, 2):\n    os.close(number)\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("sets sys.stdout to None", f"sys.stdout = sys.stderr = None\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("prints much", f"print('x' * 100_000)\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("prints bytes that are no text", f"os.write(1, b'\\xff\\xfe')\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("seeds everything", f"import random, numpy, torch\nrandom.seed(0); numpy.random.seed(0); torch.manual_seed(0)\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("torch settings", f"import torch\ntorch.set_num_threads(3)\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\ntorch.use_deterministic_algorithms(True)\ntorch.autograd.set_detect_anomaly(True)\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("warnings as errors", f"import warnings\nwarnings.simplefilter('error')\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("a recursion limit", f"sys.setrecursionlimit(10**9)\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("logging", f"import logging\nlogging.basicConfig(level=0, force=True)\nlogging.disable()\n{TAKES}", scores=(1.0, 1.0), alone=True),
    body("an exit handler that exits", f"import atexit\natexit.register(sys.exit, 5)\n{TAKES}", scores=(1.0, 1.0), alone=True),
]  # fmt: skip

CASES = [*VALUES, *SHAPES, *OBJECTS, *CALLS, *SIGNATURES, *FILES, *PROCESSES, *DISTURBING]
