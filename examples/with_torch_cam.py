"""Where a network looks: LayerCAM of two layers of a photo, fused, by torch-cam."""

from torchcam.methods import LayerCAM
from torchcam.utils import overlay_mask
from torchvision.transforms.functional import normalize, to_pil_image, to_tensor

import molt
from photo_and_network import network, photo

model = network()
img = photo()
input_tensor = normalize(to_tensor(img), mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])

with LayerCAM(model, ["blocks.4", "blocks.6"]) as cam_extractor:
    out = model(input_tensor.unsqueeze(0))
    cams = cam_extractor(out.squeeze(0).argmax().item(), out)

fused = cam_extractor.fuse_cams(cams)
overlay_mask(img, to_pil_image(fused.squeeze(0), mode="F"), alpha=0.5).save("layer-cam.jpg")
refined = cam_extractor.fuse_cams(molt.refine(cams, img, features=molt.backbones.ViTBackbone()))
overlay_mask(img, to_pil_image(refined.squeeze(0), mode="F"), alpha=0.5).save("layer-cam-refined.jpg")
