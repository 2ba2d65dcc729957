"""What makes a network say "Egyptian cat": Grad-CAM of a photo, by pytorch-grad-cam."""

import numpy as np
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import preprocess_image, show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from photo_and_network import network, photo

model = network()
rgb_img = np.float32(photo()) / 255
input_tensor = preprocess_image(rgb_img, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])

with GradCAM(model=model, target_layers=[model.blocks[-1]]) as cam:
    grayscale_cam = cam(input_tensor=input_tensor, targets=[ClassifierOutputTarget(285)])

Image.fromarray(show_cam_on_image(rgb_img, grayscale_cam[0], use_rgb=True)).save("grad-cam.jpg")
