#pragma once

namespace molt {

enum class MapType { float16, bfloat16, float32, float64 };
enum class LabelType { uint8, int32, int64 };

}  // namespace molt
