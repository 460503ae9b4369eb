package sys

import (
	"testing"
	"unsafe"

	"github.com/stretchr/testify/assert"
)

// The numbers are what a C program prints that includes linux/fs.h and
// linux/dqblk_xfs.h (sizeof, offsetof, the macros); x86-64 and arm64.
func TestQuotaLayout(t *testing.T) {
	assert.EqualValues(t, 28, unsafe.Sizeof(FSXattr{}))
	assert.EqualValues(t, 12, unsafe.Offsetof(FSXattr{}.ProjectID))
	assert.EqualValues(t, 0x801c581f, IOR[FSXattr]('X', 31))
	assert.EqualValues(t, 0x401c5820, IOW[FSXattr]('X', 32))
	assert.EqualValues(t, 112, unsafe.Sizeof(DiskQuota{}))
	assert.EqualValues(t, 8, unsafe.Offsetof(DiskQuota{}.BlockHard))
	assert.EqualValues(t, 40, unsafe.Offsetof(DiskQuota{}.Blocks))
	assert.EqualValues(t, 56, unsafe.Offsetof(DiskQuota{}.InodeTimer))
	assert.EqualValues(t, 72, unsafe.Offsetof(DiskQuota{}.RTBlockHard))
	assert.EqualValues(t, 96, unsafe.Offsetof(DiskQuota{}.RTTimer))
	assert.EqualValues(t, 160, unsafe.Sizeof(QuotaState{}))
	assert.EqualValues(t, 56, unsafe.Offsetof(QuotaState{}.Project))
	assert.EqualValues(t, 80, unsafe.Offsetof(QuotaState{}.BlockTimeLimit))
	assert.EqualValues(t, 0x580302, QuotaGet)
	assert.EqualValues(t, 0x580402, QuotaSet)
	assert.EqualValues(t, 0x580802, QuotaGetState)
}
