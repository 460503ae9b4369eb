package sys

import "structs"

// Device mapper, linux/dm-ioctl.h, interface 4.47 (Linux 6.1). Later versions
// added flags only.

// DM_NAME_LEN and DM_UUID_LEN with the terminating zero, and
// DM_MAX_TYPE_NAME.
const (
	DMNameLen = 128
	DMUUIDLen = 129
	DMTypeLen = 16
)

// DMIoctl is struct dm_ioctl, the head of every request and answer.
type DMIoctl struct {
	_           structs.HostLayout
	Version     [3]uint32
	DataSize    uint32 // of everything, this structure included
	DataStart   uint32
	TargetCount uint32
	OpenCount   int32
	Flags       uint32
	EventNr     uint32
	_           uint32
	Dev         uint64
	Name        [DMNameLen]byte
	UUID        [DMUUIDLen]byte
	Data        [7]byte
}

// DMTargetSpec is struct dm_target_spec; the parameters follow it.
type DMTargetSpec struct {
	_           structs.HostLayout
	SectorStart uint64
	Length      uint64
	Status      int32
	Next        uint32
	TargetType  [DMTypeLen]byte
}

// DMTargetMsg is struct dm_target_msg; the message follows it.
type DMTargetMsg struct {
	_      structs.HostLayout
	Sector uint64
}

// DMTargetDeps is struct dm_target_deps; Count device numbers follow it.
type DMTargetDeps struct {
	_     structs.HostLayout
	Count uint32
	_     uint32
}

// DMNameList is the head of struct dm_name_list: 12 bytes, then the name. The
// compiler of C pads the structure to 16.
type DMNameList struct {
	_    structs.HostLayout
	Dev  uint64
	Next uint32
	Name [4]byte // its beginning, and the padding
}

// DMTargetVersions is struct dm_target_versions; the name follows it.
type DMTargetVersions struct {
	_       structs.HostLayout
	Next    uint32
	Version [3]uint32
}

// Flags of DMIoctl.
const (
	DMReadOnly           = 1 << 0
	DMSuspend            = 1 << 1
	DMPersistentDev      = 1 << 3
	DMStatusTable        = 1 << 4
	DMActivePresent      = 1 << 5
	DMInactivePresent    = 1 << 6
	DMBufferFull         = 1 << 8
	DMSkipLockFS         = 1 << 10
	DMNoFlush            = 1 << 11
	DMQueryInactiveTable = 1 << 12
	DMUUID               = 1 << 14
	DMDataOut            = 1 << 16
	DMDeferredRemove     = 1 << 17
	DMInternalSuspend    = 1 << 18
)

// dm returns _IOWR(DM_IOCTL, nr, struct dm_ioctl).
func dm(nr uint) uint { return IOWR[DMIoctl](0xfd, nr) }

// The requests; each takes a DMIoctl with data behind it.
func DMVersionReq() uint          { return dm(0) }  // DM_VERSION
func DMListDevicesReq() uint      { return dm(2) }  // DM_LIST_DEVICES
func DMDevCreateReq() uint        { return dm(3) }  // DM_DEV_CREATE
func DMDevRemoveReq() uint        { return dm(4) }  // DM_DEV_REMOVE
func DMDevRenameReq() uint        { return dm(5) }  // DM_DEV_RENAME
func DMDevSuspendReq() uint       { return dm(6) }  // DM_DEV_SUSPEND
func DMDevStatusReq() uint        { return dm(7) }  // DM_DEV_STATUS
func DMTableLoadReq() uint        { return dm(9) }  // DM_TABLE_LOAD
func DMTableClearReq() uint       { return dm(10) } // DM_TABLE_CLEAR
func DMTableDepsReq() uint        { return dm(11) } // DM_TABLE_DEPS
func DMTableStatusReq() uint      { return dm(12) } // DM_TABLE_STATUS
func DMListVersionsReq() uint     { return dm(13) } // DM_LIST_VERSIONS
func DMTargetMsgReq() uint        { return dm(14) } // DM_TARGET_MSG
func DMDevArmPollReq() uint       { return dm(16) } // DM_DEV_ARM_POLL
func DMGetTargetVersionReq() uint { return dm(17) } // DM_GET_TARGET_VERSION

// BlkDiscardReq is BLKDISCARD, linux/fs.h: _IO(0x12, 119) with a pointer to
// offset and length in bytes.
func BlkDiscardReq() uint { return IO(0x12, 119) }

// BlkGetSize64Req is BLKGETSIZE64, linux/fs.h: _IOR(0x12, 114, size_t).
func BlkGetSize64Req() uint { return IOR[uintptr](0x12, 114) }
