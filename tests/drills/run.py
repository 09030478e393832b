"""The drill: kills, signals and damaged files against real processes. Nothing that a run has saved may be lost.

    python tests/drills/run.py             # everything
    python tests/drills/run.py --short     # a fifth of each kind

Each case trains a tiny model in its own folder, disturbs it, resumes it, and compares it with an undisturbed run: the
weights and the optimizer bit by bit, every logged number, each text, each file name. Exits with 1 if anything differs.
"""

import argparse
import contextlib
import itertools
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from box import VARIANTS, Box, Ended, Failure, Launcher, check, read, rows

try:
    import bad_inputs
except ModuleNotFoundError:
    bad_inputs = None

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGINT]


def no_fault(box: Box) -> None:
    """A new Python gives the same as a fork."""
    box.train(fresh=True)
    box.compare()


def resume_after_kill(box: Box, process: Ended) -> None:
    check(process.code in (-signal.SIGKILL, -signal.SIGXFSZ), "the process was not killed", process)
    box.count_lost(process)
    if box.status() == "finished":  # killed at its very end
        return box.compare()
    box.finish()


def kill_at_start(box: Box) -> None:
    resume_after_kill(box, box.train(fresh=True, disturb=box.after_start(signal.SIGKILL)))


def kill_at_random(box: Box) -> None:
    """Once, or several times: a resumed run can be killed too."""
    while (process := box.train(disturb=box.after_rows(signal.SIGKILL))).code:
        check(process.code == -signal.SIGKILL, "the process ends before the kill", process)
        if box.rng.random() < 0.6:
            return resume_after_kill(box, process)
    box.compare()  # it was faster than the kill


def kill_at_point(box: Box, pattern: str) -> None:
    process = box.train(at=box.rng.choice(box.points(pattern)), number=signal.SIGKILL)
    check(re.search(pattern, process.trace[-1]), f"killed at another point: {process.trace[-1]}")
    resume_after_kill(box, process)


def kill_in_write(box: Box, pattern: str, smallest: int, largest: int) -> None:
    """The kernel kills the process in the middle of a write to a file, after a random number of bytes."""
    limit = box.rng.randint(smallest, largest)
    resume_after_kill(box, box.train(at=box.rng.choice(box.points(pattern)), limit=limit))


def mount(folder: Path, size: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    return subprocess.run(command, capture_output=True).returncode == 0


def full_disk(box: Box, kind: str) -> None:
    """Something else fills the file system of the output. TMPDIR is on another one."""
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in box.reference.outputs.rglob("*"))
    box.outputs.mkdir()
    box.temporary, ballast = Path(tempfile.mkdtemp(dir="/dev/shm")), box.outputs / "ballast"
    if kind == "for a while":
        box.settings.append("checkpoint.max_failures=1000")

    def fill(launcher: Launcher) -> None:
        while len(rows(box.run_folder)) < 12 and not launcher.ended(0.002):
            pass
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass
        if kind == "killed":
            launcher.ended(box.rng.uniform(0, 0.3))
            launcher.send(signal.SIGKILL)
        while kind == "for a while" and "last.ckpt: cannot be written" not in launcher.read("err"):
            check(not launcher.ended(0.002), "no failed write is named")
        if kind == "for a while":
            ballast.unlink()

    check(mount(box.outputs, 2 * used), "cannot mount a file system")
    try:
        process = box.train(disturb=fill)
        ballast.unlink(missing_ok=True)
        if kind == "for a while":
            check(process.code == 0, "the run does not go on after a failed write", process)
            return box.compare()
        check(process.code in ((-signal.SIGKILL, 2) if kind == "killed" else (2,)), "not a tidy end", process)
        check(kind == "killed" or "space" in process.errors, "the full disk is not named", process)
        box.count_lost(process, at_most=10**6)
        box.finish()
    finally:
        subprocess.run(["umount", box.outputs], check=True)
        shutil.rmtree(box.temporary)


def end_by_signal(box: Box, number: int, moment: str = "", point: str = "") -> None:
    """At a random moment, or at a point of validation or texts: they must be interrupted."""
    if point:
        at = box.rng.choice(box.points(f"before {point}$"))
        process = box.train(at=at, number=number)
        more = process.trace[at:].count(f"before {point}")
        check(more <= 1, f"'{point}' goes on {more} times after the signal", process)
    else:
        process = box.train(fresh=moment == "after_start", disturb=getattr(box, moment)(number))
    if box.status() == "finished":  # it was faster than the signal
        return box.compare()
    check(process.code == 128 + number, "the exit code is not 128 + signal", process)
    lines = [line for line in process.errors.splitlines() if "resume=" in line]
    check(len(lines) == 1 or box.status() is None, "no single line says how to resume", process)
    box.count_lost(process, at_most=0)
    box.finish()


def second_signal(box: Box, number: int) -> None:
    """The process gets a signal and then hangs. The second signal must end it."""

    def send_again(launcher: Launcher) -> None:
        while "hangs" not in launcher.read("trace") and not launcher.ended(0.01):
            pass
        launcher.send(number)

    at = box.rng.choice(box.points("before on_train_batch_end"))
    process = box.train(at=at, number=number, hang=True, disturb=send_again)
    check("hangs" in process.trace and process.code in (128 + number, -number), "not ended by the signal", process)
    box.count_lost(process)
    box.finish()


def copy_half_done(box: Box, part: str = "outputs") -> None:
    """Copy a run that was killed in its last epoch."""
    shutil.copytree(box.reference.folder.with_name(f"half-{box.variant}") / part, box.folder / part)


def damage(path: Path, kind: str, rng: random.Random) -> None:
    content = path.read_bytes()
    start = rng.randrange(len(content))
    changed = {
        "cut": content[:start],
        "zeroed": content[:start] + bytes(len(content) - start),
        "flipped": content[:start] + bytes([content[start] ^ 1 << rng.randrange(8)]) + content[start + 1 :],
    }[kind]
    path.write_bytes(changed)
    if changed == content:  # these bytes were 0 before
        damage(path, kind, rng)


def damaged_checkpoints(box: Box, pattern: str, kind: str) -> None:
    copy_half_done(box)
    in_order = [box.checkpoints / "last.ckpt", *box.checkpoints.glob("step-*.ckpt"), box.checkpoints / "best.ckpt"]
    damaged = {path: path.read_bytes() for path in in_order if re.match(pattern, path.name)}
    for path, content in damaged.items():
        while read(path) is not None:  # some bits of a zip file mean nothing
            path.write_bytes(content)
            damage(path, kind, box.rng)
        damaged[path] = path.read_bytes()
        refused = box.run("sample", f"checkpoint={path.relative_to(box.folder)}", "prompt=the")
        one_line = re.fullmatch(f"error: .*{path.name}.*\n", refused.errors)
        check(refused.code == 2 and one_line, f"sample does not refuse {path.name} in one line", refused)
    if len(damaged) == len(in_order):
        process = box.train()
        check(process.code == 2 and process.errors.count("error:") == 1, "no single line lists what was tried", process)
    else:
        process = box.finish()
    for path in itertools.takewhile(damaged.__contains__, in_order):
        check(path.name in process.errors, f"{path.name} is not named", process)
        kept = [file for file in (path, path.with_name(f"{path.name}.damaged")) if file.exists()]
        check(damaged[path] in [file.read_bytes() for file in kept], f"{path.name} is not set aside", process)


def only_best(box: Box) -> None:
    copy_half_done(box)
    for path in [*box.checkpoints.glob("step-*.ckpt"), box.checkpoints / "last.ckpt"]:
        path.unlink()
    box.finish(leave_out=("files",))  # there may be no older checkpoint


def damaged_cache(box: Box, file: str, kind: str) -> None:
    copy_half_done(box, box.rng.choice(["outputs", "outputs/cache"]))  # with a run to resume, or for a new run
    path = next(box.outputs.glob(f"cache/*/{file}"))
    if kind in ("missing", "the only one"):
        for other in {path} if kind == "missing" else {*path.parent.iterdir()} - {path}:
            other.unlink()
    else:
        damage(path, kind, box.rng)
    process = box.finish()
    check(file in process.errors or path.parent.name in process.errors, "the damaged cache is not named", process)


def torn_line(box: Box, file: str, line: str) -> None:
    """The last line was written after the last checkpoint, and only in part."""
    copy_half_done(box)
    with (box.run_folder / file).open("a") as log:
        log.write(line)
    box.finish()


def lost_lines(box: Box, file: str) -> None:
    """The file is shorter than it was at the last checkpoint."""
    copy_half_done(box)
    os.truncate(box.run_folder / file, (box.run_folder / file).stat().st_size // 2)
    process = box.finish(leave_out=("metrics.csv", "samples.jsonl"))
    check(file in process.errors, f"the loss of lines of {file} is not named", process)


def broken_record(box: Box, record: str) -> None:
    """The broken run.json of another run does not stop the search for the unfinished run."""
    copy_half_done(box)
    (box.outputs / "other").mkdir()
    (box.outputs / "other" / "run.json").write_text(record)
    box.settings = []  # so the command is always `resume=auto`
    process = box.finish(leave_out=("files",))
    check("other" in process.errors, "the broken run.json is not named", process)


def complete_but_unrecorded(box: Box) -> None:
    """The newer of two runs was killed after its last checkpoint. It is recorded as finished, and the other goes on."""
    copy_half_done(box)
    record = shutil.copytree(box.reference.run_folder, box.outputs / "done") / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"status": "running", "updated": time.time()}))
    box.settings = []
    box.finish(leave_out=("files",))
    check(json.loads(record.read_text())["status"] == "finished", "the complete run is not recorded as finished")


def max_steps(box: Box) -> None:
    """A run that max_steps has ended inside an epoch goes on without max_steps."""
    box.run("train", *box.settings, f"trainer.max_steps={box.rng.randrange(1, box.reference.newest()[0])}")
    process = box.run("train", "resume=drill", "trainer.max_steps=null")
    check(process.code == 0, "the run does not go on", process)
    box.compare(leave_out=("best.ckpt", "sample"))  # the validation at the end of the first part may be the best


def bad_input(box: Box, command: str, arguments: list[str], words: str) -> None:
    process = box.run(command, *arguments, cwd=str(box.folder.with_name("bad-inputs")))
    found = [line for line in process.errors.splitlines() if line.startswith("error: ") and words in line]
    check(process.code == 2 and found, f"no error with exit code 2 and these words: {words}", process)


class Case(NamedTuple):
    row: str  # in the table
    name: str
    variant: str
    play: Callable[[Box], None]


def all_cases(references: dict[str, Box]) -> Iterator[tuple[str, str, Callable[[Box], None]]]:
    """Row, variant and action of each case."""
    plain, both = references["plain"], ("plain", "mixed")
    size = (plain.checkpoints / "last.ckpt").stat().st_size
    cache = {path.name: path.stat().st_size for path in plain.outputs.glob("cache/*/*")}
    yield "no fault", "plain", no_fault
    yield from [("kill: start-up", "plain", kill_at_start)] * 6
    yield from [("kill: random moment", variant, kill_at_random) for variant in VARIANTS] * 2
    write = partial(kill_in_write, pattern="^start$", smallest=1500, largest=max(cache.values()) - 1)
    yield from [("kill: writing the cache", "plain", write)] * 4
    write = partial(kill_in_write, pattern="before save", smallest=size // 20, largest=size * 9 // 10)
    yield from [("kill: writing a checkpoint", variant, write) for variant in both] * 3
    patterns = {"validation": "on_validation_batch", "texts": "token$", "end": "on_fit_end"}
    patterns |= {"removing a checkpoint": r"remove .*ckpt$", "syncing a file": "sync"}
    for variant, (name, pattern) in itertools.product(both, patterns.items()):
        yield f"kill: {name}", variant, partial(kill_at_point, pattern=pattern)
    for point in sorted({re.sub(r"\d+", r"\\d+", point) for point in plain.trace if " rename " in point}):
        yield "kill: before and after a rename", "plain", partial(kill_at_point, pattern=f"^{point}$")
    for kind in ("filled", "filled", "killed", "killed", "for a while", "for a while"):
        yield "full disk, TMPDIR on another", "plain", partial(full_disk, kind=kind)
    for number in SIGNALS:
        row = f"signal: {number.name}"
        yield from [(row, "plain", partial(end_by_signal, number=number, moment="after_start"))] * 2
        yield from [(row, variant, partial(end_by_signal, number=number, moment="after_rows")) for variant in VARIANTS]
        for point in ("on_validation_batch_start", "token"):
            yield row, "plain", partial(end_by_signal, number=number, point=point)
        yield from [(f"{row}, twice", variant, partial(second_signal, number=number)) for variant in both]
    for pattern, kind in itertools.product(
        ("last", "last", "step", "best", "last|step", "last|step|best"), ("cut", "zeroed", "flipped")
    ):
        yield "damaged checkpoint", "plain", partial(damaged_checkpoints, pattern=pattern, kind=kind)
    yield from [("damaged checkpoint", variant, only_best) for variant in both]
    for file, kind in itertools.product(cache, ("cut", "zeroed", "flipped", "missing", "the only one")):
        yield "damaged cache", "plain", partial(damaged_cache, file=file, kind=kind)
    for file, line in {"metrics.csv": "99,3.14", "samples.jsonl": '{"epoch": 3, "st'}.items():
        yield "damaged log or record", "plain", partial(torn_line, file=file, line=line)
        yield "damaged log or record", "plain", partial(lost_lines, file=file)
    for record in ("[1]", "{", ""):
        yield "damaged log or record", "plain", partial(broken_record, record=record)
    yield "damaged log or record", "plain", complete_but_unrecorded
    yield from [("max_steps, then more", variant, max_steps) for variant in both]
    for command, arguments, words in bad_inputs.BAD_INPUTS if bad_inputs else ():
        yield "bad input", "plain", partial(bad_input, command=command, arguments=arguments, words=words)


def prepare(work: Path, launcher: Launcher) -> dict[str, Box]:
    """Train the undisturbed runs, and half of those that will be damaged."""
    rng, words = random.Random(0), ["".join(letters) for letters in itertools.product("bdlmst", "aeiou", "nr", "ao")]
    sentences = [" ".join(["the", *rng.choices(["cat", *words], k=rng.randint(8, 16))]) for _ in range(300)]
    (work / "story.txt").write_text("\n".join(sentences) + "\n")
    references = {variant: Box(work / f"undisturbed-{variant}", variant, launcher) for variant in VARIANTS}
    for reference in references.values():
        assert reference.trace and reference.results  # trains, and reads the results
    for variant in ("plain", "mixed"):
        half = Box(work / f"half-{variant}", variant, launcher, references[variant])
        half.train(at=half.points("before on_train_batch_end")[41], number=signal.SIGKILL)
    fresh, began = Box(work / "fresh", "plain", launcher), time.time()

    def measure(launcher: Launcher) -> None:
        while not rows(fresh.run_folder) and not launcher.ended(0.005):
            pass
        references["plain"].start_seconds = time.time() - began
        launcher.send(signal.SIGKILL)

    fresh.train(fresh=True, disturb=measure)
    if bad_inputs:
        (work / "bad-inputs").mkdir()
        bad_inputs.make_folder(work / "bad-inputs", references["plain"].run_folder, work / "story.txt")
    return references


Result = tuple[str, list[tuple[int, float]]]  # the problem, or ""; steps and seconds lost


def play_all(
    cases: list[Case], launchers: list[Launcher], play: Callable[[Case, Launcher], Result]
) -> dict[Case, Result]:
    """Play each case with a free launcher, and show the progress."""
    free, results, began = queue.SimpleQueue[Launcher](), dict[Case, Result](), time.time()
    for launcher in launchers:
        free.put(launcher)

    def play_one(case: Case) -> tuple[Case, Result]:
        launcher = free.get()
        try:
            return case, play(case, launcher)
        finally:
            free.put(launcher)

    pool = ThreadPoolExecutor(len(launchers))
    try:
        for done in as_completed([pool.submit(play_one, case) for case in cases]):
            case, result = done.result()
            results[case] = result
            left = (time.time() - began) / len(results) * (len(cases) - len(results))
            print(
                f"{len(results)}/{len(cases)} cases, {left:.0f} s left: {case.name} {result[0] or 'passed'}", flush=True
            )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C, no other case starts
    return results


def print_table(results: dict[Case, Result]) -> None:
    print(f"\n{'fault':<32}{'cases':>6}{'passed':>8}{'failed':>8}{'steps lost':>16}{'seconds lost':>16}")
    print(f"{'':<54}{'mean':>10}{'most':>6}{'mean':>10}{'most':>6}")
    for row in dict.fromkeys(sorted(case.row for case in results)):
        of_row = [result for case, result in results.items() if case.row == row]
        failed = len([problem for problem, _ in of_row if problem])
        line = f"{row:<32}{len(of_row):>6}{len(of_row) - failed:>8}{failed:>8}"
        for values in zip(*(lost for _, losts in of_row for lost in losts), strict=True):
            line += f"{sum(values) / len(values):>10.1f}{max(values):>6.1f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a fifth of each kind")
    parser.add_argument("--seed", type=int, default=0, help="decides the random moments")
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: unmount, and end all processes
    print(f"seed {options.seed}; training the undisturbed runs", flush=True)
    began, work = time.time(), Path(tempfile.mkdtemp(prefix="drill-"))
    launchers = [Launcher(), Launcher()]
    try:
        references = prepare(work, launchers[0])
        numbers, cases = dict[str, int](), []
        for row, variant, play in all_cases(references):
            numbers[row] = numbers.get(row, 0) + 1
            cases.append(Case(row, f"{row} #{numbers[row]}#", variant, play))
        random.Random(options.seed).shuffle(cases)  # a mixed order makes the time left a good guess
        if options.short:
            cases = [case for row in numbers for case in [c for c in cases if c.row == row][: -(-numbers[row] // 5)]]
        if not mount(work, 2**20):
            print("skipped: the cases with a full disk, because this user cannot mount a file system")
            cases = [case for case in cases if "full disk" not in case.row]
        else:
            subprocess.run(["umount", work], check=True)

        def play_case(case: Case, launcher: Launcher) -> Result:
            folder, seed = work / re.sub(r"\W+", "-", case.name), f"{options.seed} {case.name}"
            box = Box(folder, case.variant, launcher, references[case.variant], seed)
            try:
                case.play(box)
            except Failure as failure:
                return str(failure), box.lost
            except Exception:  # a fault of this case: the table shows it, and the other cases go on
                return traceback.format_exc(), box.lost
            shutil.rmtree(folder)
            return "", box.lost

        results = play_all([case for case in cases if options.only in case.name], launchers, play_case)
    finally:
        for launcher in launchers:
            os.killpg(launcher.server.pid, signal.SIGKILL)
    print_table(results)
    failed = {case: problem for case, (problem, _) in results.items() if problem}
    print(f"{len(results)} cases, {len(failed)} failed, {time.time() - began:.0f} s")
    for case, problem in failed.items():
        print(f"\nFAILED {case.name} ({case.variant}), files in {work}: {problem}")
        print(f"repeat: python tests/drills/run.py --seed {options.seed} --only '{case.name}'")
    if failed:
        sys.exit(1)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
