package sys

import (
	"testing"
	"unsafe"

	"github.com/stretchr/testify/assert"
)

// The numbers are what a C program prints that includes linux/loop.h; x86-64
// and arm64.
func TestLoopLayout(t *testing.T) {
	assert.EqualValues(t, 232, unsafe.Sizeof(LoopInfo{}))
	assert.EqualValues(t, 40, unsafe.Offsetof(LoopInfo{}.Number))
	assert.EqualValues(t, 52, unsafe.Offsetof(LoopInfo{}.Flags))
	assert.EqualValues(t, 56, unsafe.Offsetof(LoopInfo{}.FileName))
	assert.EqualValues(t, 216, unsafe.Offsetof(LoopInfo{}.Init))
	assert.EqualValues(t, 304, unsafe.Sizeof(LoopConfig{}))
	assert.EqualValues(t, 8, unsafe.Offsetof(LoopConfig{}.Info))
}
