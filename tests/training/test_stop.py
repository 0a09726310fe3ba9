import os
import signal
import subprocess
import sys
import time

from jaxllm.training.stop import StopRequest

# The main thread is in C for a long time and cannot run a Python handler, as while XLA compiles.
BUSY = """
import hashlib, sys
from jaxllm.training.stop import StopRequest
with StopRequest(None, lambda: "step 3 is kept"):
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)
"""


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_the_first_signal_asks_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.agreed
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: stop.agreed)
        assert stop.reason == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)  # an echo: too soon to be a person's second thought
        time.sleep(0.05)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_ctrl_c_leaves_at_once_while_the_main_thread_is_in_c():
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline().startswith("SIGINT: saving after this step")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert process.communicate()[1] == "\nstep 3 is kept\n"


def test_nothing_that_fails_keeps_a_process_that_is_told_twice():
    failing = BUSY.replace('"step 3 is kept"', "1 / 0")
    process = subprocess.Popen([sys.executable, "-c", failing], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"busy\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
