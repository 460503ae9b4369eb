package sys

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

// The numbers as linux/fuse.h defines them.
func TestFuseBackingNumbers(t *testing.T) {
	assert.Equal(t, 16, SizeOf[fuseBackingMap]())
	assert.Equal(t, uint(0x4010e501), IOW[fuseBackingMap](229, 1))
	assert.Equal(t, uint(0x4004e502), IOW[uint32](229, 2))
}
