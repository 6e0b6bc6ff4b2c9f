// What the C++ and the CUDA version of cam_fuse agree on with their launchers in fastcam/native/cam_fuse.py.
#pragma once

namespace fastcam {

enum FuseActivation : int { FUSE_RAW, FUSE_RELU, FUSE_RESIZED_RELU, FUSE_FUSED_RELU };
enum FuseReduce : int { FUSE_SUM, FUSE_MEAN, FUSE_MAX, FUSE_PAIR_MAX };
enum FuseNormalize : int { FUSE_BY_NOTHING, FUSE_BY_MAX, FUSE_BY_MINMAX, FUSE_BY_SEAM };

}  // namespace fastcam
