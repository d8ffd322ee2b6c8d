"""What a worker imports before anything else, done once in the process from which a CPU's workers are forked."""

from __future__ import annotations

import os
import threading

from tqdm import tqdm

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads would compete with those of the network

from service.workers.child import main as main
from service.workers.compilation import capture_in_background as capture_in_background
from service.workers.compilation import compile_in_background as compile_in_background

tqdm.set_lock(threading.RLock())  # its own has a semaphore of the system, which stays when the process is killed
