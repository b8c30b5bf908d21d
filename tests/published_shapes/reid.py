"""Training for re-identification; the patched library writes the files."""

import argparse

import torchreid
from nn_utils import manual_seed

parser = argparse.ArgumentParser()
parser.add_argument("--root", default="reid-data")
parser.add_argument("--model", default="tiny")
parser.add_argument("--max_epoch", type=int, default=6)
args = parser.parse_args()

manual_seed(0)
datamanager = torchreid.data.ImageDataManager(
    root=args.root, sources="market1501", height=8, width=8, batch_size_train=20
)
model = torchreid.models.build_model(
    name=args.model, num_classes=datamanager.num_train_pids, loss="softmax", pretrained=False
)
optimizer = torchreid.optim.build_optimizer(model, optim="adam", lr=0.02)
scheduler = torchreid.optim.build_lr_scheduler(optimizer, lr_scheduler="single_step", stepsize=20)
engine = torchreid.engine.ImageSoftmaxEngine(
    datamanager, model, optimizer=optimizer, scheduler=scheduler, label_smooth=True
)
engine.run(save_dir="log", max_epoch=args.max_epoch, eval_freq=1, print_freq=10, test_only=False)
