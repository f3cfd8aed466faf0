"""Pictures of finished jobs as files: what all endpoints call them."""

from likeness.training.v1 import training_job_pb2 as pb

from services.gateway.dialects.base import File


def picture_files(job: pb.TrainingJob) -> list[File]:
    """The sample pictures, named by the position of their request and their own among its pictures."""
    seen: dict[int, int] = {}
    files = []
    for sample in job.result.samples:
        position = seen.get(sample.sample_index, 0)
        seen[sample.sample_index] = position + 1
        ending = "jpg" if sample.image.media_type == "image/jpeg" else "png"
        files.append(File(sample.image.key, f"{sample.sample_index}-{position}.{ending}"))
    return files
