"""What must the tests' environment say before torch and the Hub's library are imported?"""

import os

# One thread a worker: two workers fill two cores, and the ranks that tests fork from themselves
# would wait forever for a pool of OpenMP threads that the fork leaves behind. Nothing is fetched.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
