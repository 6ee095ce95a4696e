"""200 captions that no training split shows, three seeds each, measured exactly: what is drawn, and where."""
test_dataloader = dict(
    batch_size=40,
    num_workers=0,
    dataset=dict(
        type='Shapes',
        split='test',
        length=200,
        seed=0,
        size='$resolution',
        conditioning='outline',
        truth=True,
        transforms=[
            dict(type='ComputeTimeIds'),
            dict(type='PackInputs'),
        ]))
test_evaluator = [dict(type='ShapeAccuracy'), dict(type='FillAccuracy'), dict(type='GroundAccuracy'),
                  dict(type='MaskIoU')]
test_cfg = dict(type='TestLoop', seeds=3)
