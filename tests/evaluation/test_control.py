"""Control fidelity against the formulas, torchmetrics and transformers called by hand, on the same pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffengine_sdxl.datasets.transforms.condition import ModelMap
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation.control_pose import Pose
from diffengine_sdxl.registry import METRICS
from diffengine_sdxl.shapes import draw
from diffengine_sdxl.shapes.scene import Scene

HEIGHT, WIDTH = 40, 48


def pixels(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Blurred noise, uint8 [H, W, 3], in which there are edges and flat places."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (9, 9), 2), None, 0, 255, cv2.NORM_MINMAX)


def tensor(array: np.ndarray) -> Tensor:
    """Floats [3, H, W] in [0, 1]."""
    rgb = array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2)
    return torch.from_numpy(rgb.copy()).permute(2, 0, 1).float() / 255


def evaluated(metric: Any, images: Sequence[np.ndarray], **entries: Sequence[np.ndarray]) -> dict[str, float]:
    """Measure images of samples 'k0', 'k1', ... as those of the set 'adapted'; 'img' as the loader gives it."""
    data: dict[str, Any] = {name: torch.stack([tensor(v) for v in values]) for name, values in entries.items()}
    data |= {'key': [f'k{i}' for i in range(len(images))]} | ({'img': data['img'] * 2 - 1} if 'img' in data else {})
    metric.process(data, [{'key': key, 'seed': 0, 'images': {'adapted': tensor(image)}}
                          for key, image in zip(data['key'], images, strict=True)])
    results: dict[str, float] = metric.evaluate(len(images))
    return {name.removeprefix('adapted/'): value for name, value in results.items()}


def build(kind: str, **options: Any) -> Any:
    return METRICS.build(dict(type=kind, **options))


def canny(image: np.ndarray) -> np.ndarray:
    return cv2.Canny(image, 100, 200)


def test_canny_f1_is_that_of_torchmetrics() -> None:
    from torchmetrics.functional.classification import binary_f1_score
    images, conditions = [pixels(0), pixels(1)], [canny(pixels(0)), canny(pixels(0))]
    metric = build('CannyF1')
    found = evaluated(metric, images, conditioning_image=conditions)
    wanted = [float(binary_f1_score(torch.from_numpy(canny(i) // 255), torch.from_numpy(c // 255)))
              for i, c in zip(images, conditions, strict=True)]
    assert wanted[0] == 1 and 0.05 < wanted[1] < 0.9
    assert list(metric.per_image().values()) == pytest.approx(wanted, abs=1e-6)
    assert found['canny_f1'] == pytest.approx(np.mean(wanted), abs=1e-6) and found['canny_f1/better'] == 1


def test_an_extractors_network_follows_the_metrics_device() -> None:
    """Loaded by `check` before the evaluation has set it."""
    class Net(ModelMap):
        def build(self) -> Any:
            return nn.Conv2d(3, 1, 1)
    metric = build('DepthRMSE', extractor={'type': 'Canny'})
    metric.extractor = Net()
    metric.check(4, 1)
    assert metric.extractor.model.weight.device.type == 'cpu'
    metric.device = torch.device('meta')
    metric._place()
    assert metric.extractor.model.weight.device.type == 'meta'
    metric.extractor.release()
    metric.device = torch.device('cpu')
    metric.check(4, 1)
    assert metric.extractor.model.weight.device.type == 'cpu' and not metric.extractor.model.weight.requires_grad


def test_canny_f1_with_a_tolerance_and_without_edges() -> None:
    """Edges that lie one pixel off are none, and all with a tolerance of one."""
    line, shifted, empty = (np.zeros((HEIGHT, WIDTH), np.uint8) for _ in range(3))
    line[20, 5:40], shifted[21, 6:41] = 255, 255
    metric, near = build('CannyF1'), build('CannyF1', tolerance=1)
    assert (metric.score(line, shifted), near.score(line, shifted)) == (0, 1) and near.name == 'canny_f1_within_1'
    half = line.copy()
    half[20, 5:20] = 127  # gray below half is no edge
    assert metric.score(line, half) == pytest.approx(2 * (20 / 35) / (1 + 20 / 35))
    assert (metric.score(empty, empty), metric.score(empty, line), metric.score(line, empty)) == (1, 0, 0)


def test_the_outline_of_a_shape() -> None:
    """What the T2I-Adapter of the shapes world is given lies on the edges of its image; another scene's does not."""
    scenes = [Scene('star', 'flat', 'red', 'white', 'plain', x, 0.5, 0.3) for x in (0.4, 0.6)]
    images = [draw.render(scene, 64) for scene in scenes]
    outline = draw.condition(scenes[0], 64, 'outline')
    metric = build('CannyF1', tolerance=2)
    evaluated(metric, images, conditioning_image=[outline, outline])
    own, other = metric.per_image().values()
    assert own > 0.95 and other < 0.5


def test_the_truth_of_the_samples_own_image() -> None:
    """`source='img'` with thresholds, which are in the name."""
    metric = build('CannyF1', source='img', extractor=dict(type='Canny', low=50, high=80))
    found = evaluated(metric, [pixels(3)], img=[pixels(3)])
    assert found['canny_f1_50_80'] == 1 and metric.needs == ('img',)


@pytest.mark.parametrize('multi_scale', [False, True])
def test_soft_edges_by_a_callable(multi_scale: bool) -> None:
    """SSIM of torchmetrics, of maps in [0, 1]; the condition of one image is another's."""
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure,
        structural_similarity_index_measure,
    )
    size = (180, 176) if multi_scale else (HEIGHT, WIDTH)
    metric = build('SoftEdgeSSIM', multi_scale=multi_scale, extractor=dict(
        type='Preprocessor', function='PIL.ImageOps:grayscale'))
    a, b = (np.array(Image.fromarray(pixels(seed, *size)).convert('L')) for seed in (0, 1))
    name = f'softedge_{"ms_" * multi_scale}ssim_grayscale'
    found = evaluated(metric, [pixels(0, *size), pixels(0, *size)], conditioning_image=[a, b])
    compare = (multiscale_structural_similarity_index_measure if multi_scale else structural_similarity_index_measure)
    wanted = float(compare(*(torch.from_numpy(v).float()[None, None] / 255 for v in (a, b)), data_range=1.0))
    assert [*metric.per_image().values()] == pytest.approx([1, wanted], abs=1e-6) and wanted < 0.9
    assert found[name] == pytest.approx((1 + wanted) / 2, abs=1e-6)
    if multi_scale:
        with pytest.raises(UserError, match=r'40, 48.*at least 176 pixels.*multi_scale=False'):
            evaluated(metric, [pixels(0)], conditioning_image=[pixels(0)])


@pytest.fixture(scope='module')
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny networks of random weights: depth, segformer, mask2former, vitpose, yolos."""
    import transformers as t
    folder = tmp_path_factory.mktemp('networks')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t.DPTForDepthEstimation(t.DPTConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32,
            patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
            reassemble_factors=[4, 2, 1, 0.5], is_hybrid=False)).save_pretrained(folder / 'depth')
        t.SegformerForSemanticSegmentation(t.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
            strides=[2, 2], num_attention_heads=[1, 1], mlp_ratios=[1, 1], decoder_hidden_size=8,
            num_labels=4)).save_pretrained(folder / 'segformer')
        t.Mask2FormerForUniversalSegmentation(t.Mask2FormerConfig(
            backbone_config=t.SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
                                         out_features=[f'stage{i}' for i in (1, 2, 3, 4)]),
            feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=8, dim_feedforward=8,
            encoder_layers=1, decoder_layers=2, num_attention_heads=1, num_queries=9, init_std=1.0,
            num_labels=4)).save_pretrained(folder / 'mask2former')
        t.VitPoseForPoseEstimation(t.VitPoseConfig(
            backbone_config=t.VitPoseBackboneConfig(image_size=[32, 24], patch_size=[8, 8], hidden_size=16,
                                                    num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2),
            num_labels=5, scale_factor=4)).save_pretrained(folder / 'vitpose')
        t.YolosForObjectDetection(t.YolosConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
            patch_size=8, num_detection_tokens=6, num_labels=1, id2label={0: 'person'},
            label2id={'person': 0})).save_pretrained(folder / 'yolos')
    size = {'height': 32, 'width': 32}
    t.DPTImageProcessorPil(size=size).save_pretrained(folder / 'depth')
    t.SegformerImageProcessorPil(size=size).save_pretrained(folder / 'segformer')
    t.Mask2FormerImageProcessorPil(size={'height': 64, 'width': 64}).save_pretrained(folder / 'mask2former')
    t.VitPoseImageProcessorPil(size={'height': 32, 'width': 24}).save_pretrained(folder / 'vitpose')
    t.YolosImageProcessorPil(size=size).save_pretrained(folder / 'yolos')
    return folder


def by_hand(folder: Path, cls: Any, processor: Any, image: np.ndarray, **options: Any) -> tuple[Any, Any]:
    """Return an image processor and a network's output for an image."""
    made = processor.from_pretrained(folder)
    with torch.no_grad():
        return made, cls.from_pretrained(folder)(**made(images=Image.fromarray(image), return_tensors='pt', **options))


def test_depth_rmse(networks: Path) -> None:
    """Of gray levels, both stretched over 0..255; the network is dropped after the evaluation."""
    import transformers as t
    metric = build('DepthRMSE', extractor=dict(type='Depth', model=str(networks / 'depth')))
    assert metric.check(1, 1) is None and metric.better == -1
    processor, output = by_hand(networks / 'depth', t.DPTForDepthEstimation, t.DPTImageProcessorPil, pixels(0))
    depth = processor.post_process_depth_estimation(output, target_sizes=[(HEIGHT, WIDTH)])[0]['predicted_depth']
    levels = ((depth - depth.min()) / (depth.max() - depth.min()) * 255).round().numpy()
    truth = np.linspace(30, 130, HEIGHT * WIDTH).astype(np.uint8).reshape(HEIGHT, WIDTH)
    found = evaluated(metric, [pixels(0), pixels(0)], conditioning_image=[levels.astype(np.uint8), truth])
    stretched = (truth - 30.0) * 2.55
    wanted = np.sqrt(((levels - stretched) ** 2).mean())
    assert [*metric.per_image().values()] == pytest.approx([0, wanted], abs=1e-6) and wanted > 10
    assert found['depth_rmse_depth'] == pytest.approx(wanted / 2, abs=1e-6)
    assert metric.extractor._model is None
    assert metric.score(np.full((4, 4), 9, np.uint8), np.full((4, 4), 200, np.uint8)) == 0  # no relief on either


SEGMENTERS = {'segformer': ('SegformerForSemanticSegmentation', 'SegformerImageProcessorPil'),
              'mask2former': ('Mask2FormerForUniversalSegmentation', 'Mask2FormerImageProcessorPil')}


def classes(folder: Path, images: Sequence[np.ndarray]) -> Tensor:
    """Return the classes of pixels, int64 [B, H, W], by transformers."""
    import transformers
    found = []
    for image in images:
        made, output = by_hand(folder, *(getattr(transformers, name) for name in SEGMENTERS[folder.name]), image)
        found += made.post_process_semantic_segmentation(output, target_sizes=[(HEIGHT, WIDTH)])
    return torch.stack(found)


@pytest.mark.parametrize('kind', SEGMENTERS)
def test_segmentation_is_that_of_torchmetrics(kind: str, networks: Path) -> None:
    """Pixels are summed over the images; the truth is what the network finds on the samples' own."""
    from torchmetrics.functional.classification import multiclass_jaccard_index
    images, own = [pixels(0), pixels(1)], [pixels(2), pixels(1)]
    metric = build('SegmentationMIoU', model=str(networks / kind))
    assert metric.check(1, 1) is None
    found = evaluated(metric, images, img=own)
    wanted = multiclass_jaccard_index(*(classes(networks / kind, some) for some in (images, own)), 4)
    assert found[f'seg_miou_{kind}'] == pytest.approx(float(wanted), abs=1e-6) and found[f'seg_miou_{kind}'] < 1


def test_label_maps(networks: Path) -> None:
    """Pixels of 255 do not count; nor those of 0, if labels are reduced. Colours are no label map."""
    from torchmetrics.functional.classification import multiclass_jaccard_index
    folder, images = networks / 'segformer', [pixels(0), pixels(1)]
    labels = np.random.default_rng(0).choice([0, 1, 3, 255], (2, HEIGHT, WIDTH)).astype(np.uint8)
    wanted = float(multiclass_jaccard_index(classes(folder, images), torch.from_numpy(labels).long(), 4,
                                            ignore_index=255))
    metric = build('SegmentationMIoU', model=str(folder), source=None, key='labels')
    assert evaluated(metric, images, labels=[*labels])['seg_miou_segformer'] == pytest.approx(wanted, abs=1e-6)
    reduced = build('SegmentationMIoU', model=str(folder), source=None, key='labels', reduce_labels=True)
    levels = np.where(labels == 255, 0, labels + 1)
    assert evaluated(reduced, images, labels=[*levels])['seg_miou_segformer'] == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(UserError, match=r"'labels' of sample 'k0' holds colours; .* 4 classes of"):
        evaluated(metric, [pixels(0)], labels=[pixels(0)])
    with pytest.raises(UserError, match='holds the class 4;'):
        evaluated(metric, [pixels(0)], labels=[np.full((HEIGHT, WIDTH), 4, np.uint8)])


def test_pose(networks: Path) -> None:
    """Keypoints are those of transformers in the whole image, and a sample's own image has all of them."""
    import transformers as t
    metric = build('PoseAccuracy', model=str(networks / 'vitpose'), min_score=0.01)
    assert metric.check(1, 1) is None
    boxes = [[[0.0, 0.0, float(WIDTH), float(HEIGHT)]]]
    processor, output = by_hand(networks / 'vitpose', t.VitPoseForPoseEstimation, t.VitPoseImageProcessorPil,
                                pixels(0), boxes=boxes)
    person = processor.post_process_pose_estimation(output, boxes=boxes)[0][0]
    pose = metric.truth(Image.fromarray(pixels(0)), 'k')
    assert np.array_equal(pose.keypoints[0], person['keypoints'].numpy())
    assert np.array_equal(pose.scores[0], person['scores'].numpy()) and (pose.scores >= 0.01).sum() >= 3
    found = evaluated(metric, [pixels(0), pixels(1)], img=[pixels(0), pixels(0)])
    scores = [*metric.per_image().values()]
    assert scores[0] == 1 and scores[1] < 1 and found['pose_pck_vitpose'] == pytest.approx(np.mean(scores))


def test_pck_by_hand() -> None:
    """Four sure keypoints of a body 100 pixels high: one 9 pixels off, one 11, one of which the network is not sure."""
    metric = build('PoseAccuracy', model='nowhere')
    places = np.array([[[0, 0], [40, 0], [40, 100], [0, 100], [7, 7]]], dtype=float)
    truth = Pose(np.zeros((1, 4)), places, np.array([[0.9, 0.9, 0.3, 0.9, 0.1]]))
    moved = places + np.array([[[9, 0], [0, 11], [0, 0], [0, 0], [0, 0]]])
    assert metric.score(Pose(truth.boxes, moved, np.array([[0.9, 0.9, 0.9, 0.2, 0.9]])), truth) == 2 / 4
    assert metric.score(truth, truth._replace(scores=np.full((1, 5), 0.1))) is None


def test_samples_without_a_pose_are_left_out(networks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = build('PoseAccuracy', model=str(networks / 'vitpose'), min_score=0.01)
    truth = metric.truth
    monkeypatch.setattr(metric, 'truth', lambda image, sample: None if sample == 'k1' else truth(image, sample))
    found = evaluated(metric, [pixels(0), pixels(1)], img=[pixels(0), pixels(1)])
    assert found['pose_pck_vitpose'] == 1 and found['pose_pck_vitpose/num_samples'] == 1
    assert [key for key, _, _ in metric.per_image()] == ['k0']
    monkeypatch.setattr(metric, 'truth', lambda image, sample: None)
    found = evaluated(metric, [pixels(0)], img=[pixels(0)])
    assert np.isnan(found['pose_pck_vitpose']) and found['pose_pck_vitpose/num_samples'] == 0


def test_people_that_a_detector_finds(networks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes of transformers, as (left, top, width, height), the surest first; each has keypoints."""
    import transformers as t
    monkeypatch.setattr('diffengine_sdxl.evaluation.control_pose.MIN_DETECTION', 0.01)
    metric, image = build('PoseAccuracy', model=str(networks / 'vitpose'), detector=str(networks / 'yolos')), pixels(0)
    assert metric.check(1, 1) is None
    processor, output = by_hand(networks / 'yolos', t.YolosForObjectDetection, t.YolosImageProcessorPil, image)
    people = processor.post_process_object_detection(output, threshold=0.01, target_sizes=[(HEIGHT, WIDTH)])[0]
    corners = people['boxes'][people['scores'].argsort(descending=True, stable=True)].numpy()
    boxes = metric.people(Image.fromarray(image))
    assert np.allclose(boxes, np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])) and len(boxes) == 6
    assert metric.truth(Image.fromarray(image), 'k').keypoints.shape == (6, 5, 2)
    made = dict(scores=torch.tensor([0.6, 0.9]), labels=torch.tensor([0, 0]),
                boxes=torch.tensor([[1.0, 2, 11, 22], [3, 4, 9, 8]]))
    monkeypatch.setattr(t.YolosImageProcessorPil, 'post_process_object_detection', lambda *_, **__: [made])
    assert metric.people(Image.fromarray(image)).tolist() == [[3, 4, 6, 4], [1, 2, 10, 20]]


@pytest.mark.parametrize(('kind', 'options', 'words'), [
    ('CannyF1', {}, r"CannyF1: 'conditioning_image' of sample 'k0' is \[20, 24\] and its generated image \[40, 48\]"),
    ('CannyF1', {'key': 'edges'}, "CannyF1 needs 'edges' of every sample.*`key` names the sample's condition"),
    ('CannyF1', {'extractor': dict(type='Flip')}, 'the extractor Flip makes no condition'),
    ('CannyF1', {'tolerance': -1}, 'tolerance=-1'), ('PoseAccuracy', {'tolerance': 0}, 'tolerance=0 must be above 0'),
    ('DepthRMSE', {'extractor': dict(type='Depth', model='/no/such/model')}, '/no/such/model'),
    ('SegmentationMIoU', {'model': '/no/such/model'}, '/no/such/model'),
    ('PoseAccuracy', {'model': '{networks}/depth'}, "depth' is a model of type 'dpt', .*VitPoseForPoseEstimation"),
    ('SegmentationMIoU', {'model': '{networks}/vitpose'}, 'vitpose.*no AutoModelForSemanticSegmentation')])
def test_what_is_refused(kind: str, options: dict[str, Any], words: str, networks: Path) -> None:
    options = {key: value.format(networks=networks) if isinstance(value, str) else value
               for key, value in options.items()}
    with pytest.raises(UserError, match=words):
        metric = build(kind, **options)
        metric.check(1, 1)
        evaluated(metric, [pixels(0)], conditioning_image=[pixels(0, 20, 24)])
