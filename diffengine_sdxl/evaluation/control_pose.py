"""Control fidelity of poses: are the keypoints of a body where they are on the sample's own image?"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation.base import MeanMetric
from diffengine_sdxl.evaluation.control import ControlMetric
from diffengine_sdxl.evaluation.networks import NetworkSource, shared
from diffengine_sdxl.registry import METRICS

#: The smallest ViTPose, of 17 keypoints as COCO has them.
DEFAULT_MODEL = 'usyd-community/vitpose-base-simple'
#: A detection counts from this score on, and a picture of a crowd ends after so many people.
MIN_DETECTION, MAX_PEOPLE = 0.5, 20
#: Fewer keypoints are no pose.
MIN_KEYPOINTS = 3


class Pose(NamedTuple):
    """What is found on an image: of P people, their boxes (left, top, width, height in pixels) [P, 4], K keypoints
    (x, y in pixels) [P, K, 2] and how sure the network is of each [P, K]."""

    boxes: np.ndarray
    keypoints: np.ndarray
    scores: np.ndarray


@METRICS.register_module()
class PoseAccuracy(ControlMetric, MeanMetric):
    """Share of the keypoints of a sample's own image that the generated image shows in their places: PCK.

    A keypoint is one of which the network is sure on the sample's image. It is found if the network is sure of it on
    the generated image too, at a distance of at most `tolerance` times the longer edge of the box around that person's
    keypoints. Both images are looked at within the same boxes, those of the sample's image, so people need no matching,
    and one more person on the generated image costs nothing. Samples without a pose (3 keypoints) are left out.

    Args:
        model: folder or hub id of a ViTPose, which is part of the metric's name unless it is the default.
        revision: of the hub.
        detector: folder or hub id of an object detector of transformers, which finds the people; None: the whole image
            is the box of one person, who should fill it.
        source: the sample's image.
        tolerance: of a place, 0 to 1.
        min_score: from which the network is sure, 0 to 1.
        kwargs: see ImageMetric.

    Source: Yang and Ramanan, Articulated Human Detection with Flexible Mixtures of Parts, PAMI 35 (2013), for PCK; Xu
    et al. 2022, ViTPose, arXiv:2204.12484, for the network.
    """

    name = 'pose_pck'
    hint = "It compares with the pose on the sample's own image, `source`."

    def __init__(self, model: str = DEFAULT_MODEL, revision: str | None = None, detector: str | None = None,
                 source: str = 'img', tolerance: float = 0.1, min_score: float = 0.3, **kwargs: Any) -> None:
        for key, value in (('tolerance', tolerance), ('min_score', min_score)):
            if not 0 < value <= 1:
                raise UserError(f'PoseAccuracy: {key}={value!r} must be above 0 and at most 1.')
        self.network = shared(NetworkSource(model, '', revision, head='VitPoseForPoseEstimation'))
        self.detector = None if detector is None else shared(
            NetworkSource(detector, head='AutoModelForObjectDetection'))
        self.tolerance, self.min_score = tolerance, min_score
        self.name += '' if model == DEFAULT_MODEL else f'_{self.network.source.label}'
        super().__init__(source=source, **kwargs)

    def check(self, num_samples: int, num_seeds: int) -> str | None:
        """Find the files of the networks.

        Raises:
            UserError: names what is missing; or the detector knows no people.
        """
        self.network.check()
        if self.detector is not None:
            self.detector.check()
            if 'person' not in map(str.lower, self.detector.config.id2label.values()):
                raise UserError(f"PoseAccuracy: the detector '{self.detector.source}' knows no 'person'; name one that "
                                "was trained on COCO, such as 'PekingU/rtdetr_r50vd_coco_o365'.")
        return None

    @torch.no_grad()
    def pose(self, image: Image.Image, boxes: np.ndarray) -> Pose:
        """Return the keypoints in each of P boxes [P, 4], (left, top, width, height) in pixels; P at least 1."""
        processor: Any = self.network.preprocess
        inputs = processor(image, boxes=[boxes.tolist()], return_tensors='pt').to(self.device)
        if self.network.config.backbone_config.num_experts > 1:
            inputs['dataset_index'] = torch.zeros(len(boxes), dtype=torch.int64, device=self.device)  # COCO
        outputs = self.network.on(self.device)(**inputs)
        people = processor.post_process_pose_estimation(outputs, boxes=[boxes.tolist()])[0]
        return Pose(boxes, *(np.stack([person[name].numpy() for person in people])
                             for name in ('keypoints', 'scores')))

    @torch.no_grad()
    def people(self, image: Image.Image) -> np.ndarray:
        """Return the boxes of P people (left, top, width, height in pixels), [P, 4], the surest first."""
        if self.detector is None:
            return np.array([[0.0, 0.0, image.width, image.height]])
        processor: Any = self.detector.preprocess
        outputs = self.detector.on(self.device)(**processor(images=image, return_tensors='pt').to(self.device))
        found = processor.post_process_object_detection(outputs, threshold=MIN_DETECTION,
                                                        target_sizes=[(image.height, image.width)])[0]
        person = np.array([self.detector.config.id2label[label].lower() == 'person'
                           for label in found['labels'].tolist()], dtype=bool)
        order = np.argsort(-found['scores'].cpu().numpy()[person], kind='stable')[:MAX_PEOPLE]
        corners = found['boxes'].cpu().numpy()[person][order]
        return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)

    def truth(self, image: Image.Image, sample: str) -> Pose | None:
        """Return the pose of the sample's image; None without a person."""
        boxes = self.people(image)
        return self.pose(image, boxes) if len(boxes) else None

    def compare(self, image: Image.Image, truth: Pose | None) -> float | None:
        """Return the share of keypoints that are found, 0..1; None if the sample shows no pose."""
        if truth is None:
            return None
        return self.score(self.pose(image, truth.boxes), truth)

    def score(self, found: Pose, truth: Pose) -> float | None:
        """Return the share of the keypoints of `truth` that are in `found`, 0..1; None if there is no pose."""
        hits = total = 0
        for k in range(len(truth.boxes)):
            sure = truth.scores[k] >= self.min_score
            if sure.sum() < MIN_KEYPOINTS:
                continue
            places = truth.keypoints[k][sure]
            distances = np.linalg.norm(found.keypoints[k][sure] - places, axis=-1)
            near = distances <= self.tolerance * np.ptp(places, axis=0).max()
            hits += int((near & (found.scores[k][sure] >= self.min_score)).sum())
            total += int(sure.sum())
        return hits / total if total else None
