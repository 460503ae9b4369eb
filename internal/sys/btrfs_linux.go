package sys

import (
	"os"
	"runtime"
	"structs"
	"unsafe"
)

// The ioctl numbers of include/uapi/linux/btrfs.h, Linux 6.18.
const (
	btrfsMagic = 0x94

	dirW  = iocWrite << 30
	dirR  = iocRead << 30
	dirRW = (iocRead | iocWrite) << 30
)

// Requests on a btrfs file system. Each names the C macro it stands
// for; constants, because [IOW] and the like cannot be evaluated by the compiler.
const (
	BtrfsIocSync           = uint(btrfsMagic<<8 | 8)                                                     // BTRFS_IOC_SYNC
	BtrfsIocSnapDestroy    = dirW | uint(unsafe.Sizeof(BtrfsVolArgs{}))<<16 | btrfsMagic<<8 | 15         // BTRFS_IOC_SNAP_DESTROY
	BtrfsIocTreeSearchV2   = dirRW | uint(unsafe.Sizeof(BtrfsSearchArgs{}))<<16 | btrfsMagic<<8 | 17     // BTRFS_IOC_TREE_SEARCH_V2
	BtrfsIocInoLookup      = dirRW | uint(unsafe.Sizeof(BtrfsInoLookup{}))<<16 | btrfsMagic<<8 | 18      // BTRFS_IOC_INO_LOOKUP
	BtrfsIocSpaceInfo      = dirRW | uint(unsafe.Sizeof(BtrfsSpaceArgs{}))<<16 | btrfsMagic<<8 | 20      // BTRFS_IOC_SPACE_INFO
	BtrfsIocStartSync      = dirR | uint(unsafe.Sizeof(uint64(0)))<<16 | btrfsMagic<<8 | 24              // BTRFS_IOC_START_SYNC
	BtrfsIocWaitSync       = dirW | uint(unsafe.Sizeof(uint64(0)))<<16 | btrfsMagic<<8 | 22              // BTRFS_IOC_WAIT_SYNC
	BtrfsIocSnapCreateV2   = dirW | uint(unsafe.Sizeof(BtrfsVolArgsV2{}))<<16 | btrfsMagic<<8 | 23       // BTRFS_IOC_SNAP_CREATE_V2
	BtrfsIocSubvolCreateV2 = dirW | uint(unsafe.Sizeof(BtrfsVolArgsV2{}))<<16 | btrfsMagic<<8 | 24       // BTRFS_IOC_SUBVOL_CREATE_V2
	BtrfsIocSubvolGetFlags = dirR | uint(unsafe.Sizeof(uint64(0)))<<16 | btrfsMagic<<8 | 25              // BTRFS_IOC_SUBVOL_GETFLAGS
	BtrfsIocSubvolSetFlags = dirW | uint(unsafe.Sizeof(uint64(0)))<<16 | btrfsMagic<<8 | 26              // BTRFS_IOC_SUBVOL_SETFLAGS
	BtrfsIocDevInfo        = dirRW | uint(unsafe.Sizeof(BtrfsDevInfo{}))<<16 | btrfsMagic<<8 | 30        // BTRFS_IOC_DEV_INFO
	BtrfsIocFsInfo         = dirR | uint(unsafe.Sizeof(BtrfsFsInfo{}))<<16 | btrfsMagic<<8 | 31          // BTRFS_IOC_FS_INFO
	BtrfsIocSetReceived    = dirRW | uint(unsafe.Sizeof(BtrfsReceivedArgs{}))<<16 | btrfsMagic<<8 | 37   // BTRFS_IOC_SET_RECEIVED_SUBVOL
	BtrfsIocSend           = dirW | uint(unsafe.Sizeof(BtrfsSendArgs{}))<<16 | btrfsMagic<<8 | 38        // BTRFS_IOC_SEND
	BtrfsIocQuotaCtl       = dirRW | uint(unsafe.Sizeof(BtrfsQuotaCtl{}))<<16 | btrfsMagic<<8 | 40       // BTRFS_IOC_QUOTA_CTL
	BtrfsIocQgroupAssign   = dirW | uint(unsafe.Sizeof(BtrfsQgroupAssign{}))<<16 | btrfsMagic<<8 | 41    // BTRFS_IOC_QGROUP_ASSIGN
	BtrfsIocQgroupCreate   = dirW | uint(unsafe.Sizeof(BtrfsQgroupCreate{}))<<16 | btrfsMagic<<8 | 42    // BTRFS_IOC_QGROUP_CREATE
	BtrfsIocQgroupLimit    = dirR | uint(unsafe.Sizeof(BtrfsQgroupLimitArgs{}))<<16 | btrfsMagic<<8 | 43 // BTRFS_IOC_QGROUP_LIMIT
	BtrfsIocRescan         = dirW | uint(unsafe.Sizeof(BtrfsRescan{}))<<16 | btrfsMagic<<8 | 44          // BTRFS_IOC_QUOTA_RESCAN
	BtrfsIocRescanStatus   = dirR | uint(unsafe.Sizeof(BtrfsRescan{}))<<16 | btrfsMagic<<8 | 45          // BTRFS_IOC_QUOTA_RESCAN_STATUS
	BtrfsIocSubvolInfo     = dirR | uint(unsafe.Sizeof(BtrfsSubvolInfo{}))<<16 | btrfsMagic<<8 | 60      // BTRFS_IOC_GET_SUBVOL_INFO
	BtrfsIocSubvolRootRef  = dirRW | uint(unsafe.Sizeof(BtrfsRootRefs{}))<<16 | btrfsMagic<<8 | 61       // BTRFS_IOC_GET_SUBVOL_ROOTREF
	BtrfsIocInoLookupUser  = dirRW | uint(unsafe.Sizeof(BtrfsInoLookupUser{}))<<16 | btrfsMagic<<8 | 62  // BTRFS_IOC_INO_LOOKUP_USER
	BtrfsIocSnapDestroyV2  = dirW | uint(unsafe.Sizeof(BtrfsVolArgsV2{}))<<16 | btrfsMagic<<8 | 63       // BTRFS_IOC_SNAP_DESTROY_V2
	BtrfsIocEncodedWrite   = dirW | uint(unsafe.Sizeof(BtrfsEncodedArgs{}))<<16 | btrfsMagic<<8 | 64     // BTRFS_IOC_ENCODED_WRITE
	BtrfsIocSubvolSyncWait = dirW | uint(unsafe.Sizeof(BtrfsSubvolWait{}))<<16 | btrfsMagic<<8 | 65      // BTRFS_IOC_SUBVOL_SYNC_WAIT, Linux 6.13
	FsIocGetVersion        = dirR | uint(unsafe.Sizeof(uintptr(0)))<<16 | 'v'<<8 | 1                     // FS_IOC_GETVERSION, linux/fs.h
	FsIocEnableVerity      = dirW | uint(unsafe.Sizeof(FsverityEnable{}))<<16 | 'f'<<8 | 133             // FS_IOC_ENABLE_VERITY, linux/fsverity.h
)

// BtrfsVolArgs is struct btrfs_ioctl_vol_args.
type BtrfsVolArgs struct {
	_    structs.HostLayout
	FD   int64
	Name [4088]byte
}

// BtrfsVolArgsV2 is struct btrfs_ioctl_vol_args_v2. The first eight bytes of
// Name hold the subvolume id where the call takes one.
type BtrfsVolArgsV2 struct {
	_           structs.HostLayout
	FD          int64
	Transid     uint64
	Flags       uint64
	InheritSize uint64
	Inherit     uint64
	_           [2]uint64
	Name        [4040]byte
}

// SetID stores a subvolume id in the place of the name.
func (a *BtrfsVolArgsV2) SetID(id uint64) { *(*uint64)(unsafe.Pointer(&a.Name)) = id }

// BtrfsSearchKey is struct btrfs_ioctl_search_key.
type BtrfsSearchKey struct {
	_                        structs.HostLayout
	Tree                     uint64
	MinObjectid, MaxObjectid uint64
	MinOffset, MaxOffset     uint64
	MinTransid, MaxTransid   uint64
	MinType, MaxType         uint32
	Items                    uint32
	_                        uint32
	_                        [4]uint64
}

// BtrfsSearchArgs is struct btrfs_ioctl_search_args_v2; the buffer follows it.
type BtrfsSearchArgs struct {
	_       structs.HostLayout
	Key     BtrfsSearchKey
	BufSize uint64
}

// BtrfsSearchHeader is struct btrfs_ioctl_search_header.
type BtrfsSearchHeader struct {
	_        structs.HostLayout
	Transid  uint64
	Objectid uint64
	Offset   uint64
	Type     uint32
	Len      uint32
}

// BtrfsInoLookup is struct btrfs_ioctl_ino_lookup_args.
type BtrfsInoLookup struct {
	_        structs.HostLayout
	Treeid   uint64
	Objectid uint64
	Name     [4080]byte
}

// BtrfsInoLookupUser is struct btrfs_ioctl_ino_lookup_user_args.
type BtrfsInoLookupUser struct {
	_      structs.HostLayout
	Dirid  uint64
	Treeid uint64
	Name   [256]byte
	Path   [3824]byte
}

// BtrfsTimespec is struct btrfs_ioctl_timespec.
type BtrfsTimespec struct {
	_    structs.HostLayout
	Sec  uint64
	Nsec uint32
	_    uint32
}

// BtrfsSubvolInfo is struct btrfs_ioctl_get_subvol_info_args.
type BtrfsSubvolInfo struct {
	_            structs.HostLayout
	Treeid       uint64
	Name         [256]byte
	ParentID     uint64
	Dirid        uint64
	Generation   uint64
	Flags        uint64
	UUID         [16]byte
	ParentUUID   [16]byte
	ReceivedUUID [16]byte
	Ctransid     uint64
	Otransid     uint64
	Stransid     uint64
	Rtransid     uint64
	Ctime        BtrfsTimespec
	Otime        BtrfsTimespec
	Stime        BtrfsTimespec
	Rtime        BtrfsTimespec
	_            [8]uint64
}

// BtrfsRootRef is an element of [BtrfsRootRefs].
type BtrfsRootRef struct {
	_      structs.HostLayout
	Treeid uint64
	Dirid  uint64
}

// BtrfsRootRefs is struct btrfs_ioctl_get_subvol_rootref_args.
type BtrfsRootRefs struct {
	_         structs.HostLayout
	MinTreeid uint64
	Refs      [255]BtrfsRootRef
	Num       uint8
	_         [7]uint8
}

// BtrfsSpaceArgs is struct btrfs_ioctl_space_args; the slots follow it.
type BtrfsSpaceArgs struct {
	_     structs.HostLayout
	Slots uint64
	Total uint64
}

// BtrfsSpaceInfo is struct btrfs_ioctl_space_info.
type BtrfsSpaceInfo struct {
	_     structs.HostLayout
	Flags uint64
	Total uint64
	Used  uint64
}

// BtrfsDevInfo is struct btrfs_ioctl_dev_info_args.
type BtrfsDevInfo struct {
	_     structs.HostLayout
	Devid uint64
	UUID  [16]byte
	Used  uint64
	Total uint64
	_     [379]uint64
	Path  [1024]byte
}

// BtrfsFsInfo is struct btrfs_ioctl_fs_info_args.
type BtrfsFsInfo struct {
	_              structs.HostLayout
	MaxID          uint64
	NumDevices     uint64
	Fsid           [16]byte
	Nodesize       uint32
	Sectorsize     uint32
	CloneAlignment uint32
	CsumType       uint16
	CsumSize       uint16
	Flags          uint64
	Generation     uint64
	MetadataUUID   [16]byte
	_              [944]byte
}

// BtrfsReceivedArgs is struct btrfs_ioctl_received_subvol_args.
type BtrfsReceivedArgs struct {
	_        structs.HostLayout
	UUID     [16]byte
	Stransid uint64
	Rtransid uint64
	Stime    BtrfsTimespec
	Rtime    BtrfsTimespec
	Flags    uint64
	_        [16]uint64
}

// BtrfsSendArgs is struct btrfs_ioctl_send_args.
type BtrfsSendArgs struct {
	_          structs.HostLayout
	FD         int64
	CloneCount uint64
	Clones     uint64 // address of the ids, see BtrfsSend
	Parent     uint64
	Flags      uint64
	Version    uint32
	_          [28]byte
}

// BtrfsQuotaCtl is struct btrfs_ioctl_quota_ctl_args.
type BtrfsQuotaCtl struct {
	_      structs.HostLayout
	Cmd    uint64
	Status uint64
}

// BtrfsQgroupAssign is struct btrfs_ioctl_qgroup_assign_args.
type BtrfsQgroupAssign struct {
	_                structs.HostLayout
	Assign, Src, Dst uint64
}

// BtrfsQgroupCreate is struct btrfs_ioctl_qgroup_create_args.
type BtrfsQgroupCreate struct {
	_              structs.HostLayout
	Create, Qgroup uint64
}

// BtrfsQgroupLimit is struct btrfs_qgroup_limit.
type BtrfsQgroupLimit struct {
	_       structs.HostLayout
	Flags   uint64
	MaxRfer uint64
	MaxExcl uint64
	RsvRfer uint64
	RsvExcl uint64
}

// BtrfsQgroupLimitArgs is struct btrfs_ioctl_qgroup_limit_args.
type BtrfsQgroupLimitArgs struct {
	_      structs.HostLayout
	Qgroup uint64
	Limit  BtrfsQgroupLimit
}

// BtrfsRescan is struct btrfs_ioctl_quota_rescan_args.
type BtrfsRescan struct {
	_        structs.HostLayout
	Flags    uint64
	Progress uint64
	_        [6]uint64
}

// BtrfsEncodedArgs is struct btrfs_ioctl_encoded_io_args.
type BtrfsEncodedArgs struct {
	_               structs.HostLayout
	IOV             uintptr // see BtrfsEncodedWrite
	IOVCount        uintptr
	Offset          int64
	Flags           uint64
	Len             uint64
	UnencodedLen    uint64
	UnencodedOffset uint64
	Compression     uint32
	Encryption      uint32
	_               [64]byte
}

// BtrfsSubvolWait is struct btrfs_ioctl_subvol_wait.
type BtrfsSubvolWait struct {
	_     structs.HostLayout
	ID    uint64
	Mode  uint32
	Count uint32
}

// FsverityEnable is struct fsverity_enable_arg.
type FsverityEnable struct {
	_         structs.HostLayout
	Version   uint32
	Hash      uint32
	BlockSize uint32
	SaltSize  uint32
	Salt      uint64 // address, see EnableVerity
	SigSize   uint32
	_         uint32
	Sig       uint64 // address
	_         [11]uint64
}

// BtrfsSend calls BTRFS_IOC_SEND with the addresses of clones filled in. It
// blocks until the stream is written, so the reader must be elsewhere.
func BtrfsSend(f *os.File, args *BtrfsSendArgs, clones []uint64) error {
	var pin runtime.Pinner
	defer pin.Unpin()
	if len(clones) > 0 {
		pin.Pin(&clones[0])
		args.CloneCount = uint64(len(clones))
		args.Clones = uint64(uintptr(unsafe.Pointer(&clones[0])))
	}
	return Ioctl(f, "ioctl BTRFS_IOC_SEND", BtrfsIocSend, args)
}

// BtrfsEncodedWrite calls BTRFS_IOC_ENCODED_WRITE with data, which must not be
// empty. The call returns the number of bytes of data it took.
func BtrfsEncodedWrite(f *os.File, args *BtrfsEncodedArgs, data []byte) error {
	type iovec struct {
		_    structs.HostLayout
		base unsafe.Pointer
		len  uintptr
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	iov := &iovec{base: unsafe.Pointer(unsafe.SliceData(data)), len: uintptr(len(data))}
	pin.Pin(iov)
	pin.Pin(unsafe.SliceData(data))
	args.IOV, args.IOVCount = uintptr(unsafe.Pointer(iov)), 1
	return Ioctl(f, "ioctl BTRFS_IOC_ENCODED_WRITE", BtrfsIocEncodedWrite, args)
}

// EnableVerity calls FS_IOC_ENABLE_VERITY; salt and sig may be empty.
func EnableVerity(f *os.File, hash uint8, blockSize uint32, salt, sig []byte) error {
	var pin runtime.Pinner
	defer pin.Unpin()
	args := &FsverityEnable{Version: 1, Hash: uint32(hash), BlockSize: blockSize, SaltSize: uint32(len(salt)), SigSize: uint32(len(sig))}
	if len(salt) > 0 {
		pin.Pin(&salt[0])
		args.Salt = uint64(uintptr(unsafe.Pointer(&salt[0])))
	}
	if len(sig) > 0 {
		pin.Pin(&sig[0])
		args.Sig = uint64(uintptr(unsafe.Pointer(&sig[0])))
	}
	return Ioctl(f, "ioctl FS_IOC_ENABLE_VERITY", FsIocEnableVerity, args)
}
