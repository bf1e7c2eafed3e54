"""Which benchmark tasks are there? One table; a new task is one file and one line here."""

from eval.task import Task
from eval.tasks.cv_bench import CvBench
from eval.tasks.video_choice import VideoChoice

TASKS: dict[str, type[Task]] = {CvBench.name: CvBench, VideoChoice.name: VideoChoice}
